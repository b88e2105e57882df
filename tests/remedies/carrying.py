"""Attention by carried scores, dense: what every layer's output must be, from the calls as the model made them."""

from __future__ import annotations

import pytest
import torch
from attending import Dense, dense_softmax, real_rows, tolerance
from remedy_patients import Case


def raw_scores(call: Dense) -> torch.Tensor:
    """What a layer adds to the sum: its scores without biases where they are known, else those that are visible."""
    if call.q is not None and call.k is not None:
        return call.scale * call.q @ call.k.mT
    return torch.where(call.visible, call.s, 0.0)


def check(mask: str, case: Case, calls: list[Dense], counts) -> None:
    """Every self-attention is softmax(Σ c_j s_j + its own biases, where it sees) V.

    Args:
        mask: for the tolerance.
        case: the model.
        calls: of one forward.
        counts: of (l, layers) → c_1 … c_l.
    """
    own = [call for call in calls if call.part == "self"]
    assert own
    for call in own:
        before = [one for one in own if one.stack == call.stack and one.layer <= call.layer]
        c = counts(len(before), len([one for one in own if one.stack == call.stack]))
        h = sum(weight * raw_scores(one) for weight, one in zip(c, before, strict=True))
        if call.q is not None:  # biases are the layer's own
            h = h + torch.where(call.visible, call.s - raw_scores(call), 0.0)
        expected = dense_softmax(h.masked_fill(~call.visible, -torch.inf)) @ call.v
        rows = real_rows(case, call)
        torch.testing.assert_close(call.output[rows], expected[rows], rtol=0, atol=tolerance(mask))
    moved = [
        float((call.output - call.A @ call.v)[real_rows(case, call)].abs().max()) for call in own if call.layer > 1
    ]
    assert min(moved) > 1e-3


def gradients(case: Case) -> dict[str, torch.Tensor]:
    """Of a fixed functional of the output."""
    case.model.zero_grad()
    output = case()
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    (output * probe).sum().backward()
    return {name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None}


def check_repeated_blocks(case: Case, prepare) -> None:
    """Activation checkpointing changes no gradient.

    Args:
        case: a model of transformers.
        prepare: repairs it; gives the handle.
    """
    with prepare():
        wanted = gradients(case)
        case.model.train()
        checkpointed(case.model, reentrant=False)
        found = gradients(case)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def checkpointed(model, *, reentrant: bool) -> None:
    """Repeat blocks in the backward pass, under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def check_compiled(case: Case, prepare) -> None:
    """The repaired model compiles into one graph that computes the same, with the same gradients."""
    with prepare():
        wanted, answer = gradients(case), case()
        plain = case.model.forward
        torch._dynamo.reset()
        compiled = torch.compile(case.model, backend="aot_eager", fullgraph=True)
        other = Case(compiled, case.batch, case.blocks)
        torch.testing.assert_close(other(), answer, rtol=0, atol=1e-12)
        for name, value in gradients(other).items():
            torch.testing.assert_close(value, wanted[name.removeprefix("_orig_mod.")], rtol=1e-9, atol=1e-9)
        assert case.model.forward == plain
        torch._dynamo.reset()


def check_decoding(llama, prepare) -> None:
    """Token by token with a growing cache, a decoder says what it says of the whole text."""
    ids = torch.arange(1, 8)[None]
    with prepare(), torch.no_grad():
        whole = llama(input_ids=ids, use_cache=False)[0]
        cache, states = None, []
        for one in ids[0]:
            out = llama(input_ids=one[None, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            states.append(out[0])
    torch.testing.assert_close(torch.cat(states, 1), whole, rtol=0, atol=1e-10)


def without_skips(name: str, *, norm: bool, seeds=range(3), depth: int = 12, **options):
    """Attention alone on random tokens: the residual after every block, in the mean over seeds.

    Args:
        name: remedy, or None.
        norm: whether blocks read a layer norm.
        seeds: of weights and tokens.
        depth: blocks.
        options: of the reference transformer.
    """
    import fullrank
    from fullrank.zoo import Transformer, TransformerConfig

    shape = {"depth": depth, "width": 128, "heads": 4, "mlp_width": 0, "biases": False, "positions": "none"}
    form = {"norm": "layernorm", "placement": "pre"} if norm else {"norm": "none", "placement": "none"}
    config = TransformerConfig(kind="encoder", final_norm=False, **{**shape, **form, "skip_scale": 0.0, **options})
    found = []
    for seed in seeds:
        model = Transformer(config, seed=seed).double().eval()
        tokens = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(50 + seed), dtype=torch.float64)
        batch = {"inputs_embeds": tokens}
        if name is not None:
            fullrank.repair(model, name, batch=batch)
        states: list[torch.Tensor] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, output, states=states: states.append(output))
        with torch.no_grad():
            model(**batch)
        found.append([float((X - X.mean(1, keepdim=True)).norm() / X.norm()) for X in states])
    return torch.tensor(found, dtype=torch.float64).mean(0)


def refuses(model, name: str, words: str, batch) -> None:
    """A model that a remedy does not fit is left as it is."""
    import fullrank
    from fullrank.errors import RemedyError
    from untouched import changes, everything

    before = everything(model)
    with pytest.raises(RemedyError, match=words):
        fullrank.repair(model, name, batch=batch)
    assert changes(before, everything(model)) == []
