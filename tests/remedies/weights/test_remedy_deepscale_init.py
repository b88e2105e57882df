"""DeepScaleLM's initialisation: sizes by role and layer, the weighted residual, and the variance that stays."""

import math

import kinds
import pytest
import torch
import transformers as hf
from matrices import NAMES, matrices, others, rms

import fullrank
from fullrank.remedies import repairs_in
from fullrank.zoo import Transformer, TransformerConfig
from golden import assert_golden

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def tracked(depth, r=0.221, p=0.0, beta2=None):
    """r of what attention reads in each layer and after the last, by the card."""
    beta2 = 1 / depth if beta2 is None else beta2
    found = [r]
    for _ in range(depth):
        r = (1 - beta2) * r + beta2 * (1 - p)
        r = (1 - beta2) * r + beta2 * (1 - p) * (r + (math.sqrt(1 - r * r) - r * math.acos(r)) / math.pi)
        found.append(r)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_has_the_size_of_the_card_in_its_old_direction(name):
    kind = kinds.build(name)
    before = matrices(name, kind.model)
    rest = others(kind.model, before)
    r, d, hidden = tracked(3), 32, before[next(key for key in before if key[2] == "up")].shape[0]
    with fullrank.repair(kind.model, "deepscale-init", embeddings=False, batch=kind.batch) as repair:
        for (stack, layer, role), W in matrices(name, kind.model).items():
            match role.removeprefix("cross."):
                case "q" | "k":
                    std = d**-0.5 * (8**-0.5 if name == "t5" and role.endswith("q") else 1)
                case "v" | "o":
                    std = math.sqrt(math.sqrt(1 / (r[-1] if "cross" in role else r[layer - 1])) / d)
                case _:
                    std = (2 / (d * hidden)) ** 0.25 if name != "llama" else (2 / (d * d * hidden)) ** (1 / 6)
            old = before[stack, layer, role]
            torch.testing.assert_close(W, old / rms(old) * std, rtol=1e-7, atol=0)
        assert repair.parameters == 0
        assert all(torch.equal(p, rest[n]) for n, p in kind.model.named_parameters() if n in rest)


def small(model):
    return model.double().eval()


def swin():
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, hidden_act="relu"
    )
    model = small(hf.SwinModel(config))
    blocks = [block for stage in model.encoder.layers for block in stage.blocks]
    layers = {
        n: (b.attention.q_proj, b.attention.k_proj, b.attention.v_proj, b.attention.o_proj, b.mlp.fc1, b.mlp.fc2)
        for n, b in enumerate(blocks, 1)
    }
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return model, {"pixel_values": images}, layers, tracked(4)


def of_another_width():
    """A decoder of width 64 that attends to an encoder of width 16; its cross-attention."""
    encoder = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16, patch_size=4
    )
    decoder = hf.TrOCRConfig(
        vocab_size=64, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=128,
        max_position_embeddings=64, cross_attention_hidden_size=16,
    )  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = small(hf.VisionEncoderDecoderModel(config))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    layers = {
        n: (a.q_proj, a.k_proj, a.v_proj, a.out_proj, b.fc1, b.fc2)
        for n, b in enumerate(model.decoder.model.decoder.layers, 1)
        for a in [b.encoder_attn]
    }
    return model, {"pixel_values": images, "decoder_input_ids": kinds.ids(2, 7)}, layers, [tracked(2)[-1]] * 2


@pytest.mark.parametrize("build", [swin, of_another_width])
def test_every_weight_is_sized_by_its_own_inputs_in_models_of_several_widths(build):
    model, batch, layers, r = build()
    assert len({linear.in_features for each in layers.values() for linear in each}) > 2
    with fullrank.repair(model, "deepscale-init", residual=False, embeddings=False, batch=batch):
        for layer, (q, k, v, o, up, down) in layers.items():
            for linear in (q, k):
                assert rms(linear.weight.detach()) ** 2 * linear.in_features == pytest.approx(1)
            # Var(W_O r^½ W_V x) = σ⁴ · d_v · d_o · r and Var(W_down relu(W_up x)) = σ⁴ · d_up · d_down/2
            for linear in (v, o):
                moment = rms(linear.weight.detach()) ** 4 * v.in_features * o.in_features * r[layer - 1]
                assert moment == pytest.approx(1)
            for linear in (up, down):
                assert rms(linear.weight.detach()) ** 4 * up.in_features * down.in_features / 2 == pytest.approx(1)


def test_branches_of_a_hierarchical_model_have_the_variance_of_the_card_in_every_stage():
    model, batch, _, _ = swin()
    found = []
    for stage in model.encoder.layers:
        for block in stage.blocks:
            block.mlp.register_forward_hook(lambda module, args, output: found.append(float(output.square().mean())))
    with torch.no_grad(), fullrank.repair(model, "deepscale-init", how="draw", batch=batch):
        found.clear()
        model(**batch)
    assert len(found) == 4
    assert all(0.5 < each < 2 for each in found)


def test_low_rank_values_are_sized_by_their_rank():
    config = hf.DeepseekV3Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = small(hf.DeepseekV3Model(config))
    with fullrank.repair(model, "deepscale-init", batch={"input_ids": kinds.ids(), "use_cache": False}):
        for layer, r in zip(model.layers, tracked(2), strict=False):
            a = layer.self_attn
            k, v = (W.detach() for W in a.kv_b_proj.weight.view(4, 16, 16).split(8, dim=1))
            assert rms(a.q_b_proj.weight.detach()) == pytest.approx(12**-0.5)
            assert rms(k) == pytest.approx(16**-0.5)
            for W in (v, a.o_proj.weight.detach()):
                assert rms(W) == pytest.approx((1 / (r * 16 * 32)) ** 0.25)


def test_dropout_and_the_square_of_the_branch_enter_as_on_the_card():
    kind = kinds.build("plain")
    r = tracked(3, 0.4, 0.1, 0.2)
    setting = {"correlation": 0.4, "dropout": 0.1, "branch_square": 0.2, "embeddings": False, "how": "draw"}
    with fullrank.repair(kind.model, "deepscale-init", **setting, batch=kind.batch):
        found = matrices("plain", kind.model)
    for layer in (1, 2, 3):
        std = math.sqrt(math.sqrt(0.9 / r[layer - 1]) / 32)
        assert rms(found["decoder", layer, "v"]) == pytest.approx(std, rel=0.1)
        assert rms(found["decoder", layer, "down"]) == pytest.approx(
            (1.8 / found["decoder", layer, "down"].numel()) ** 0.25, rel=0.1
        )


def config(**options):
    sizes = {"depth": 24, "width": 64, "heads": 4, "activation": "relu", "biases": False, "vocabulary": 64}
    return TransformerConfig(
        **(sizes | {"context": 64, "positions": "none", "norm": "none", "placement": "none"} | options)
    )


@pytest.mark.parametrize("options", [{}, {"parallel": True}, {"norm": "layernorm", "placement": "post"}], ids=str)
def test_skip_and_branch_are_weighted_as_a_model_written_so(options):
    wanted = config(depth=3, **options)
    model = Transformer(wanted, seed=0).double().eval()
    batch = {"input_ids": torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))}
    beta2 = 1 / 3
    branch = math.sqrt(beta2 / 2) if "parallel" in options else math.sqrt(beta2)
    written = Transformer(wanted.with_(skip_scale=math.sqrt(1 - beta2), residual_scale=branch), seed=1).double().eval()
    with torch.no_grad(), fullrank.repair(model, "deepscale-init", batch=batch):
        written.load_state_dict({n: p for n, p in model.state_dict().items() if n in written.state_dict()})
        torch.testing.assert_close(model(**batch).logits, written(**batch).logits, rtol=0, atol=1e-12)
        assert repairs_in(model)[0]["structural"]
    with fullrank.repair(model, "deepscale-init", residual=False, batch=batch):
        assert not repairs_in(model)[0]["structural"]


def variances(model, batch):
    seen = []
    hooks = [
        b.register_forward_hook(lambda m, a, output: seen.append(float(output.square().mean()))) for b in model.blocks
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_variance_stays_at_one_through_24_layers_without_norms_and_grows_without_it():
    # words of which every second is the same: r₀ is not 0
    generator = torch.Generator().manual_seed(1)
    common, own = (torch.randn(4, n, 64, generator=generator).double() for n in (1, 64))
    batch = {"inputs_embeds": 0.221**0.5 * common + (1 - 0.221) ** 0.5 * own}
    model = Transformer(config(), seed=0).double().eval()
    assert variances(model, batch)[-1] > 50
    with fullrank.repair(model, "deepscale-init", how="draw", tokens=64, batch=batch):
        assert all(0.6 < each < 1.5 for each in variances(model, batch))


def test_golden_moments_of_attention_with_its_first_weights():
    """One head of unit tokens, through a repaired model's own q, k and v: the law that the sizes come from."""
    model = Transformer(config(depth=1, width=256, heads=1, context=64), seed=0).double().eval()
    found = []
    for r in (0.2, 0.6):
        variance, covariance = [], []
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            Q = 16 * torch.linalg.qr(torch.randn(256, 65, generator=generator).double())[0].mT
            X = (r**0.5 * Q[:1] + (1 - r) ** 0.5 * Q[1:])[None]  # unit variance and cosine r exactly
            setting = {"how": "draw", "seed": seed, "correlation": 1.0, "batch": {"inputs_embeds": X}}
            seen = []
            # r₀ = 1 makes σ_v² = 1/d, that of the card's setting
            with torch.no_grad(), fullrank.repair(model, "deepscale-init", **setting):
                inner = model.blocks[0].attention.inner
                hook = inner.output.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0][0]))
                model(inputs_embeds=X)
                hook.remove()
            gram = seen[0] @ seen[0].mT / 256
            variance.append(gram.diagonal().mean())
            covariance.append((gram.sum() - gram.trace()) / (64 * 63))
        found.append((torch.stack(variance).mean(), torch.stack(covariance).mean()))
    assert_golden("dslm-attention-variance", [each[0] for each in found])
    assert_golden("dslm-attention-covariance", [each[1] for each in found])
