"""Everything in models of the zoo is seen: blocks, attention calls, branches, their architecture, their health."""

import pytest
import torch
from naive_zoo import batch_for

import fullrank
from fullrank import edit
from fullrank.capture import survey
from fullrank.diagnosis.initialisation import reinitialised
from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig

SMALL = {"depth": 3, "width": 16, "heads": 2, "vocabulary": 30, "image": 12, "patch": 3}
PLACEMENTS = ["pre", "post", "peri", "res-post", "none"]


def model_and_batch(config, tokens=10):
    model = (StateSpace if isinstance(config, StateSpaceConfig) else Transformer)(config, seed=1).eval()
    batch = batch_for(config, sequences=3, tokens=tokens)
    return model, {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def looked_at(model, batch):
    return survey(model, lambda: model(**batch))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["encoder", "decoder", "vision"])
def test_capture_sees_every_block_every_attention_call_and_every_branch(kind, placement, attention, parallel):
    config = TransformerConfig(kind=kind, placement=placement, attention=attention, parallel=parallel, **SMALL)
    model, batch = model_and_batch(config)
    anatomy = looked_at(model, batch)
    (stack,) = anatomy.stacks
    assert anatomy.notes == ()
    assert stack.name == kind
    assert stack.paths == ("blocks.0", "blocks.1", "blocks.2")
    assert stack.calls == (("self",),) * 3
    assert stack.callers == tuple((f"blocks.{n}.attention.inner",) for n in range(3))
    assert (stack.heads, stack.width, stack.causal) == (2, 16, kind == "decoder")
    roles = {weight.role: weight.parameter for weight in stack.weights[1]}
    assert roles == {
        "q": "blocks.1.attention.inner.query.weight",
        "k": "blocks.1.attention.inner.key.weight",
        "v": "blocks.1.attention.inner.value.weight",
        "o": "blocks.1.attention.inner.output.weight",
        "up": "blocks.1.mlp.inner.up.weight",
        "down": "blocks.1.mlp.inner.down.weight",
    }
    branches = edit.find_branches(model, lambda: model(**batch), anatomy)
    assert branches.notes == ()
    found = [(one.layer, one.name, one.path) for one in branches]
    assert found == [(n + 1, name, f"blocks.{n}.{name}") for n in range(3) for name in ("attention", "mlp")]


@pytest.mark.parametrize(
    "scales", [{"residual_scale": 0.5}, {"skip_scale": 0.5}, {"residual_scale": 2.0, "dropout": 0.1}]
)
@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
def test_branches_are_found_through_scales_and_dropout(placement, scales):
    model, batch = model_and_batch(TransformerConfig(placement=placement, **SMALL | scales))
    branches = edit.find_branches(model, lambda: model(**batch), looked_at(model, batch))
    assert branches.notes == ()
    assert [one.path for one in branches][:2] == ["blocks.0.attention", "blocks.0.mlp"]


@pytest.mark.parametrize("attention", ["fused", "explicit"])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "vision"])
def test_an_attention_call_is_of_the_kind_that_was_asked_for_and_can_be_rewritten(kind, attention):
    model, batch = model_and_batch(TransformerConfig(kind=kind, attention=attention, key_value_heads=1, **SMALL))
    before, kinds = model(**batch).logits, []

    def without(call, output):
        kinds.append(("explicit" if call.query is None else "fused", tuple(output.shape)))
        return 0 * output

    tokens = model.config.tokens if kind == "vision" else 10
    with edit.rewrite_attention(model, looked_at(model, batch), after=without):
        changed = model(**batch).logits
    assert [one[0] for one in kinds] == [attention] * 3
    assert kinds[0][1] == (3, 2, tokens, 8)
    assert not torch.allclose(changed, before, atol=1e-3)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.inner.output.weight.zero_()
    torch.testing.assert_close(model(**batch).logits, changed)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_scaling_a_branch_is_the_option(placement):
    """The branch is what is multiplied by `residual_scale`, wherever the norm stands."""
    config = TransformerConfig(placement=placement, **SMALL)
    model, batch = model_and_batch(config)
    branches = edit.find_branches(model, lambda: model(**batch), looked_at(model, batch))
    scaled, _ = model_and_batch(config.with_(residual_scale=0.3))
    with edit.scale_branch(model, branches, by=0.3):
        torch.testing.assert_close(model(**batch).logits, scaled(**batch).logits)


READ_BACK = [
    *[{"placement": name} for name in ("pre", "post", "peri", "res-post")],
    *[{"placement": name, "parallel": True} for name in ("pre", "post", "peri", "res-post")],
    {"norm": "rmsnorm", "placement": "peri"},
    {"norm": "none", "placement": "none"},
    {"norm": "batchnorm"},
    *[{"activation": name} for name in ("identity", "relu", "silu", "tanh")],
    {"gated": True, "activation": "silu", "norm": "rmsnorm", "biases": False},
    {"mlp_width": 0},
    {"mlp_width": 24},
    {"key_value_heads": 1},
    *[{"positions": name} for name in ("sinusoidal", "rotary", "none")],
    {"qk_norm": True},
    {"residual_scale": 0.25},
    {"skip_scale": 0.5},
    {"residual_scale": 0.5, "placement": "post"},
    *[{"residual_scale": 0.5, "skip_scale": 0.9, "placement": name} for name in ("post", "peri", "res-post")],
    {"skip_scale": 2.0, "placement": "post", "norm": "rmsnorm"},
    {"skip_scale": 1.5, "placement": "post", "parallel": True},
    {"window": 5},
    {"attention": "explicit"},
    {"dropout": 0.2},
    {"qk_std": 2.0, "value_std": 0.5, "output_std": 3.0, "up_std": 0.7, "down_std": 0.2},
    {"weight_std": 0.05, "down_std": 0.5},
]


@pytest.mark.parametrize("kind", ["encoder", pytest.param("decoder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", READ_BACK, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_the_architecture_of_a_model_is_what_its_configuration_says(kind, options):
    config = TransformerConfig(kind=kind, **SMALL | options)
    found = fullrank.Architecture.from_model(*model_and_batch(config, tokens=24))
    same = ["depth", "width", "heads", "key_value_heads", "mlp_width", "norm", "placement", "parallel", "qk_norm"]
    same += ["dropout", "mask", "window", "positions"] + (["activation", "gated"] if config.mlp_width else [])
    assert {name: getattr(found, name) for name in same} == {name: getattr(config, name) for name in same}
    assert found.attention_branch == pytest.approx(config.residual_scale, rel=1e-3)
    assert found.attention_skip == pytest.approx(config.skip_scale, rel=1e-3)
    if config.mlp_width:
        assert (found.mlp_branch, found.mlp_skip) == (found.attention_branch, found.attention_skip)

    def std(multiple, inputs):
        return pytest.approx(multiple * (config.weight_std or inputs**-0.5), rel=0.15)

    assert (found.std_q, found.std_k, found.std_v) == (std(config.qk_std, 16),) * 2 + (std(config.value_std, 16),)
    assert found.std_o == std(config.output_std, 16)
    if config.mlp_width:
        assert (found.std_up, found.std_down) == (std(config.up_std, 16), std(config.down_std, config.mlp_width))


HEALTHY = [
    *[TransformerConfig(kind=kind, placement=place) for kind in ("encoder", "decoder") for place in ("pre", "post")],
    TransformerConfig(kind="vision", classes=4),
    TransformerConfig(kind="vision", class_token=True, pooling="first"),
    TransformerConfig(kind="decoder", norm="rmsnorm", gated=True, activation="silu", positions="rotary", biases=False),
    TransformerConfig(attention="explicit", placement="peri"),
    StateSpaceConfig(),
    StateSpaceConfig(write="convex", gate=False),
]


@pytest.mark.parametrize(
    "config", HEALTHY, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'kind', c.norm)}-{c.placement}"
)
def test_examine_sees_a_healthy_model(config):
    model, batch = model_and_batch(config, tokens=32)
    ids = batch.get("input_ids")
    batch["labels"] = torch.arange(3) % 4 if ids is None else ids
    report = fullrank.examine(model, batch, gradients=True)
    assert [verdict for verdict in report.verdicts if verdict.severity != "note"] == []
    metrics = {row.metric for row in report.rows.rows if row.value is not None}
    assert {"similarity", "rms"} <= metrics
    assert ("normalized_entropy" in metrics) == isinstance(config, TransformerConfig)


@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(**SMALL, norm="batchnorm", gated=True, qk_norm=True, weight_std=0.02, value_std=3.0),
        TransformerConfig(kind="decoder", **SMALL, tie_embeddings=True),
        TransformerConfig(kind="vision", **SMALL, class_token=True),
        StateSpaceConfig(depth=2, width=16, vocabulary=30),
    ],
    ids=["encoder", "decoder", "vision", "state space"],
)
def test_a_model_can_be_drawn_again(config):
    """Another draw of the same law: other numbers, the same spreads; constants are where they start."""
    model, _ = model_and_batch(config)
    state = torch.random.get_rng_state()
    found, again, other = (reinitialised(model, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.model is not None and again.model is not None and other.model is not None, found.how
    fresh, same, different = (dict(one.model.named_parameters()) for one in (found, again, other))
    for name, parameter in model.named_parameters():
        assert torch.equal(fresh[name], same[name])
        assert float(fresh[name].detach().std(correction=0)) == pytest.approx(
            float(parameter.detach().std(correction=0)), rel=0.5
        )
        if len(parameter.unique()) > 2 and "step.bias" not in name and "log_rate" not in name:
            assert not torch.equal(fresh[name], parameter)
            assert not torch.equal(fresh[name], different[name])
        else:
            assert torch.equal(fresh[name], parameter)


def test_the_state_space_is_a_stack_of_branches_without_attention():
    model, batch = model_and_batch(StateSpaceConfig(depth=3, width=16, vocabulary=30))
    anatomy = looked_at(model, batch)
    (stack,) = anatomy.stacks
    assert (stack.paths, stack.calls, stack.width) == (("blocks.0", "blocks.1", "blocks.2"), ((),) * 3, 16)
    branches = edit.find_branches(model, lambda: model(**batch), anatomy)
    assert branches.notes == ()
    assert [one.path for one in branches] == ["blocks.0.mixer", "blocks.1.mixer", "blocks.2.mixer"]
