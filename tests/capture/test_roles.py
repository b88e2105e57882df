"""Roles of weights: found by lineage alone, they are those that the names of every family tell."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, REFUSED, build
from roles import ENDS, ROLES
from seen import Keep, record

from fullrank.capture import Recorder, survey, undisturbed
from fullrank.capture.weights import indices, matrix, per_head
from fullrank.operators import AttentionOperator

SURVEYED = sorted({family for family, _ in ROLES})


def found_in(weights, path):
    return {
        weight.part: (
            weight.parameter.removeprefix(f"{path}."),
            None if weight.rows is None else tuple(indices(weight.rows)),
            weight.transposed,
            tuple(name.removeprefix(f"{path}.") for name in weight.beside),
        )
        for weight in weights
        if weight.expert in (None, 0)
    }


def test_every_family_has_its_names_here():
    assert set(SURVEYED) == set(FAMILIES) - set(REFUSED)


@pytest.mark.parametrize("family", SURVEYED)
def test_roles_are_those_that_the_names_tell(family):
    case = build(family)
    with undisturbed(case.model):
        stacks = survey(case.model, case.run).stacks
    assert {(family, stack.name) for stack in stacks} == {key for key in ROLES if key[0] == family}
    for stack in stacks:
        expected = {}
        for layer, (path, weights) in enumerate(zip(stack.paths, stack.weights, strict=True), 1):
            expected = ROLES[family, stack.name].get(layer, expected)
            wanted = {part: (e.parameter, e.rows, e.transposed, e.beside) for part, e in expected.items()}
            assert found_in(weights, path) == wanted, (stack.name, layer)
            assert not any(weight.reason for weight in weights)
        ends = {"embed": stack.embed, "unembed": stack.unembed}
        assert {part: weight and weight.parameter for part, weight in ends.items()} == ENDS[family, stack.name]
        assert_experts_are_numbered(stack)
        assert_heads_share_the_rows_evenly(stack)
        for weight in (weight for weights in stack.weights for weight in weights):
            assert matrix(case.model, weight).ndim == 2, weight.part  # the last expert's too


NORM_OF_ALL_HEADS = {"olmo2", "olmo3", "olmoe"}
"""Families whose norm of queries and keys is over all heads: one of them changes the size of all."""

FUSED = {family for (family, _), layers in ROLES.items() for parts in layers.values() for e in parts.values() if e.rows}


@pytest.mark.parametrize(
    "family", [family if family in FUSED else pytest.param(family, marks=pytest.mark.slow) for family in SURVEYED]
)
def test_changing_the_rows_of_a_head_changes_that_head_and_nothing_else(family):
    case = build(family)
    before, recorder, _ = record(case.model, case.run)
    assert_a_head_s_rows_make_that_head(case, recorder.anatomy, before, norm_of_all_heads=family in NORM_OF_ALL_HEADS)


def assert_experts_are_numbered(stack):
    for weights in stack.weights:
        for part in {weight.part for weight in weights if weight.expert is not None}:
            experts = [weight for weight in weights if weight.part == part]
            assert [weight.expert for weight in experts] == list(range(len(experts)))
            assert len(experts) > 1
            places = [(w.parameter, w.expert if w.stacked else None, w.rows, w.columns) for w in experts]
            assert len(set(places)) == len(experts)
            assert len({re.sub(r"\d+", "#", weight.parameter) for weight in experts}) == 1


def assert_heads_share_the_rows_evenly(stack):
    for weights in stack.weights:
        for weight in weights:
            heads = [tuple(indices(head)) for head in weight.heads]
            if not heads:
                continue
            assert len({len(head) for head in heads}) == 1
            distinct = set(heads)
            assert len(heads) % len(distinct) == 0
            assert len({number for head in distinct for number in head}) == sum(map(len, distinct))
            if weight.role == "q" and weight.rows is not None:
                assert {number for head in heads for number in head} == set(indices(weight.rows))
            if weight.role == "o":
                assert sorted(number for head in heads for number in head) == list(range(sum(map(len, heads))))


def held(call):
    """Queries, keys and values of a call, or its map where the model made it; each by head."""
    found = {"v": call.value.transpose(0, 1)}
    if isinstance(call.attention, AttentionOperator):
        scores = call.attention.scores
        return found | {"q": scores.query.transpose(0, 1), "k": scores.key.transpose(0, 1)}
    A = call.attention.dense()
    return found | ({"qk": A.transpose(0, 1)} if A.shape[-1] > 1 else {})


def assert_a_head_s_rows_make_that_head(case, anatomy, before, *, norm_of_all_heads):
    """The rows of the last head a thousand times over: of q, k and v in the first attending block nothing else changes.

    Learned queries may start from zeros: the first block whose values are not zero is looked at.
    """
    parameters = dict(case.model.named_parameters())
    stacks = anatomy.stacks
    compared = 0
    for stack in stacks:
        calls = [call for call in before.calls if call.stack == stack.name and call.value is not None]
        zeros = {call.layer for call in calls if not bool(call.value.any())}
        layer = min((call.layer for call in calls if call.layer not in zeros), default=None)
        for weight in stack.weights[layer - 1] if layer else ():
            if weight.role not in ("q", "k", "v") or not weight.heads or weight.parameter not in parameters:
                continue
            chosen = weight.heads[-1]
            parameter = parameters[weight.parameter]
            kept = parameter.detach().clone()
            rows = indices(chosen)
            with torch.no_grad():
                if weight.transposed:
                    parameter.flatten(1)[:, rows] *= -1e3
                else:
                    parameter[rows] *= -1e3
            after = Keep(frozenset({"attention"}))
            with Recorder(case.model, [after], anatomy=anatomy):
                case.run()
            with torch.no_grad():
                parameter.copy_(kept)
            mixed = norm_of_all_heads and weight.role in ("q", "k")
            assert_only_this_changed(stack, layer, weight, before, after, shared(stacks, weight), mixed=mixed)
            compared += 1
    assert compared or not any(weight.heads for stack in stacks for weights in stack.weights for weight in weights)


def shared(stacks, weight):
    """Roles and calls of the same block that the same rows play too."""
    rows = set(indices(weight.heads[-1]))
    return {
        (other.call, other.role)
        for stack in stacks
        for weights in stack.weights
        for other in weights
        if other.parameter == weight.parameter and other.role in ("q", "k", "v")
        if not other.heads or rows & {number for head in other.heads for number in indices(head)}
    }


def assert_only_this_changed(stack, layer, weight, before, after, same_rows, *, mixed):
    for one, other in zip(before.calls, after.calls, strict=True):
        if (one.stack, one.layer, one.part) != (stack.name, layer, weight.call) or one.value is None:
            continue
        was, now = held(one), held(other)
        for role in was:
            changed = {h for h, (a, b) in enumerate(zip(was[role], now[role], strict=True)) if not torch.equal(a, b)}
            plays = {role} if role != "qk" else {"q", "k"}
            if not any((weight.call, name) in same_rows for name in plays):
                assert not changed, (weight.part, role)
            elif weight.role in plays:
                heads, kernel = len(weight.heads), len(was[role])
                mine = {h for h, rows in enumerate(weight.heads) if rows == weight.heads[-1]}
                mine = {h * kernel // heads for h in mine} if role != "qk" else mine
                mine = set(range(kernel)) if mixed else mine
                assert changed == mine, (weight.part, role, mine, changed)
        return
    pytest.fail(f"no call of {stack.name} {layer} {weight.call} was compared")


def test_a_matrix_is_what_the_parameter_does():
    case = build("gpt2")
    _, recorder, _ = record(case.model, case.run)
    fused = case.model.h[0].attn.c_attn.weight
    q, k, v, o, up, down = recorder.anatomy.stacks[0].weights[0]
    assert torch.equal(matrix(case.model, k), fused[:, 32:64].T)
    assert torch.equal(per_head(case.model, v)[1], fused[:, 72:80].T)
    assert torch.equal(per_head(case.model, o)[2], case.model.h[0].attn.c_proj.weight.T[:, 16:24])
    assert matrix(case.model, k).data_ptr() == fused.data_ptr() + 32 * 4  # a view: nothing is copied
    assert not matrix(case.model, q).requires_grad
    assert (matrix(case.model, up).shape, matrix(case.model, down).shape) == ((128, 32), (32, 128))
