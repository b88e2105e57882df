"""DeepNorm: skips and weights of post-norm models."""

import kinds
import pytest
import torch
import transformers as hf
from blocks import POST, by_hand, close, repaired
from family import TEXT
from schemes import deep, gradients, repaired_states, residual, states

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies.residual.deepnorm import deepnorm_constants


@pytest.mark.parametrize("name", POST)
def test_the_skip_is_stronger_under_the_norm(name):
    found, _ = repaired(name, "deepnorm", weights=False)
    close(found, by_hand(name, lambda layer, b, X, F: 6**0.25 * X + F))
    found, _ = repaired(name, "deepnorm", weights=False, alpha=3.0)
    close(found, by_hand(name, lambda layer, b, X, F: 3 * X + F))


def test_a_plain_model_becomes_the_one_that_is_built_with_it():
    model, X = deep(3, width=32, placement="post")
    b = 24**-0.25
    options = {"value_std": b, "output_std": b, "up_std": b, "down_std": b, "skip_scale": 6**0.25}
    twin, _ = deep(3, width=32, placement="post", **options)
    with torch.no_grad(), fullrank.repair(model, "deepnorm", batch={"inputs_embeds": X}):
        close(model(inputs_embeds=X).logits, twin(inputs_embeds=X).logits, 1e-4)


def test_encoder_and_decoder_have_constants_of_their_own():
    sizes = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 50}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32}
    config = hf.BartConfig(encoder_layers=2, decoder_layers=3, **sizes, **{k: TEXT[k] for k in TEXT if "token_id" in k})
    model = hf.BartModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (2, 7), generator=generator)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scaled = ("v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    both = (2**4 * 3) ** (1 / 16)
    divisors = {"encoder": both / 1.15, "decoder": 36**0.25}
    with fullrank.repair(model, "deepnorm", batch=batch):
        for name, p in model.named_parameters():
            factor = 1 / divisors[name.split(".")[0]] if name.endswith(scaled) else 1.0
            torch.testing.assert_close(p.detach(), before[name] * factor)
        with torch.no_grad():
            found = model(**batch).last_hidden_state
    with fullrank.repair(model, "deepnorm?weights=false", batch=batch) as repair:
        assert len(repair.applied[0].edit.where) == 2 * 2 + 3 * 3
    assert deepnorm_constants(2, 3)[0] == pytest.approx(0.81 * both)
    assert deepnorm_constants(3, 2, decoder=True) == pytest.approx((9**0.25, 36**0.25))
    assert deepnorm_constants(18) == pytest.approx((6**0.5, 12**0.5))
    assert bool(torch.isfinite(found).all())


def test_norms_whose_gains_are_zero_are_norms_after_the_sum():
    kind = kinds.build("bert")
    with torch.no_grad():
        for block in kind.blocks("encoder"):
            block.attention.output.LayerNorm.weight.zero_()
            block.output.LayerNorm.weight.zero_()
    with fullrank.repair(kind.model, "deepnorm", batch=kind.batch) as repair:
        assert sum("encoder layer" in place for place in repair.applied[0].edit.where) == 6


@pytest.mark.parametrize("placement", ["pre", "peri", "res-post", "none"])
def test_models_without_a_norm_after_the_sum_are_refused(placement):
    options = {"norm": "none"} if placement == "none" else {}
    model, X = deep(2, width=32, placement=placement, **options)
    with pytest.raises(RemedyError, match=rf"stand otherwise \({placement}\); use residual-scale or scaled-init"):
        fullrank.repair(model, "deepnorm", batch={"inputs_embeds": X})


def test_deep_post_norm_models_keep_tokens_and_gradients():
    model, X = deep(placement="post")
    assert residual(states(model, X)[-1]) < 0.01
    assert residual(repaired_states(model, X, "deepnorm")[-1]) > 0.95
    plain = gradients(model, X)
    with fullrank.repair(model, "deepnorm", batch={"inputs_embeds": X}):
        found = gradients(model, X)
    assert plain[1] < 0.05 < 0.2 < found[1]  # queries and keys
    assert abs(found[2] - 1) < 0.1  # first and last layer alike
