"""DeepScaleLM's initialisation: sizes by role and layer, the weighted residual, and the variance that stays."""

import math

import kinds
import pytest
import torch
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


@pytest.mark.parametrize(("name", "count"), [("bert", 3), ("gpt2", 2), ("t5", 1)])
def test_embeddings_that_are_summed_have_variance_one_together(name, count):
    kind = kinds.build(name)
    with fullrank.repair(kind.model, "deepscale-init", batch=kind.batch):
        inner = matrices(name, kind.model)
        tables = [p for n, p in kind.model.named_parameters() if n in others(kind.model, inner) and p.ndim == 2]
        sized = [p for p in tables if p.shape[1] == 32 and p.shape[0] in (50, 64, 512, 2)]
        assert len(sized) == count
        for table in sized:
            assert rms(table.detach()) == pytest.approx(count**-0.5, rel=1e-12)


def test_a_table_tied_to_the_head_stays():
    config = TransformerConfig(
        kind="decoder", depth=2, width=16, heads=2, vocabulary=20, context=8, tie_embeddings=True
    )
    model = Transformer(config, seed=0).double().eval()
    before = model.embedding.words.weight.detach().clone()
    with fullrank.repair(model, "deepscale-init", batch={"input_ids": torch.arange(8)[None]}):
        assert torch.equal(model.embedding.words.weight, before)
        assert rms(model.embedding.positions.weight.detach()) == pytest.approx(2**-0.5)


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
