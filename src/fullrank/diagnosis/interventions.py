"""Interventions put into a model: each as edits of `fullrank.edit`, or the reason why it cannot be done there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy, Stack
from fullrank.capture.padding import RealTokens
from fullrank.diagnosis.deflation import deflated
from fullrank.diagnosis.hiding import hidden_keys, hide
from fullrank.diagnosis.intervention import Intervention, Kind
from fullrank.diagnosis.sequence_means import sequence_means
from fullrank.edit import Call, Edit, replace_heads, replace_stream, rewrite_attention, skip_block, together
from fullrank.errors import EditError

__all__ = ["apply", "groups_of", "real_in", "stack_of"]


def apply(
    model: nn.Module,
    anatomy: Anatomy,
    intervention: Intervention,
    *,
    real: Tensor | Mapping[str, Tensor] | None = None,
    packed: bool = False,
) -> Edit | str:
    """Put an intervention into a model, for one batch.

    Every layer of `intervention.layer` and `also` is edited. What can only be known in a forward is raised there as an
    `EditError`: heads that a layer does not have, a kernel that cannot be rewritten.

    `skip-block` runs the block and hands its input on. `zero-head` and `mean-head` change what the kernel returns,
    before W_O; the mean is over the call's own tokens (a window where attention is windowed), and in a causal stack
    over those so far. `merge-heads` changes the same, by factors that `Merging` has measured before. `mask-sink` hides
    a key from all queries but that of its own token; a query that would see nothing keeps it, and a sequence without
    that many real keys stays as it is. `stream-means` as `mean-head`, of the stream. `deflate-attention` makes the map
    once more, and multiplies it up to 64 times with eight vectors: it costs a multiple of the attention itself. The
    others cost no more than the forward.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        intervention: what to do.
        real: (sequences, tokens), which tokens of the batch are real, by stack where the stacks differ. Where nothing
            is told, keys that the mask of a call hides from every query count as padding.
        packed: whether rows hold several documents each: then what is of one sequence cannot be said.

    Returns:
        The edit in force, to be undone; or a sentence why it cannot be done on this model.
    """
    make = _MAKERS[intervention.kind]
    edits: list[Edit] = []
    try:
        stack = stack_of(anatomy, intervention)
        if packed and intervention.kind in _OF_SEQUENCES:
            return f"the rows of the batch hold several documents each, and {_OF_SEQUENCES[intervention.kind]}."
        told = RealTokens(anatomy, real)
        for layer in dict.fromkeys((intervention.layer, *intervention.also)):
            edits.append(make(model, anatomy, stack, layer, intervention, told))  # noqa: PERF401 - undone on failure
    except EditError as reason:
        for edit in reversed(edits):
            edit.undo()
        return str(reason)
    return edits[0] if len(edits) == 1 else together(edits)


_OF_SEQUENCES: Final = {
    "mean-head": "their tokens have no one mean",
    "stream-means": "their tokens have no one mean",
    "mask-sink": "a position in the row is none in a document",
}


def stack_of(anatomy: Anatomy, intervention: Intervention) -> Stack:
    """The stack that is meant.

    Args:
        anatomy: what `capture.survey` found.
        intervention: names it.

    Returns:
        The stack.

    Raises:
        EditError: where there is none of that name, or it has no tokens.
    """
    found = next((stack for stack in anatomy.stacks if stack.name == intervention.stack), None)
    if found is None:
        names = ", ".join(stack.name for stack in anatomy.stacks)
        raise EditError(f"the model has no stack {intervention.stack!r}; it has {names}.")
    if found.over == "samples" and intervention.kind != "skip-block":
        raise EditError(f"the stream of {found.name} holds one vector for each item of the batch, and no tokens.")
    return found


Maker = Callable[[nn.Module, Anatomy, Stack, int, Intervention, RealTokens], Edit]


def _skip_block(
    model: nn.Module, anatomy: Anatomy, stack: Stack, layer: int, how: Intervention, told: RealTokens
) -> Edit:
    return skip_block(model, anatomy, stack=stack.name, layer=layer)


def _zero_head(
    model: nn.Module, anatomy: Anatomy, stack: Stack, layer: int, how: Intervention, told: RealTokens
) -> Edit:
    return replace_heads(model, anatomy, 0.0, heads=how.heads or None, stack=stack.name, layer=layer, part=how.part)


def _mean_head(
    model: nn.Module, anatomy: Anatomy, stack: Stack, layer: int, how: Intervention, told: RealTokens
) -> Edit:
    def mean(call: Call, output: Tensor) -> Tensor:
        queries, _ = real_in(call, anatomy, stack, told)
        heads = _checked(how.heads, call) or range(output.shape[1])
        chosen = torch.tensor(heads, device=output.device)
        return output.index_copy(1, chosen, sequence_means(output[:, chosen], queries, causal=stack.causal))

    return rewrite_attention(model, anatomy, after=mean, stack=stack.name, layer=layer, part=how.part)


def _merge_heads(
    model: nn.Module, anatomy: Anatomy, stack: Stack, layer: int, how: Intervention, told: RealTokens
) -> Edit:
    groups = groups_of(how)
    if len(how.factors) != len(groups):
        raise EditError("by how much the heads that stay are to be multiplied was not measured: see Merging.")

    def merged(call: Call, output: Tensor) -> Tensor:
        _checked(tuple(head for group in groups for head in group), call)
        by = torch.ones(output.shape[1], dtype=torch.promote_types(output.dtype, torch.float32))
        for (kept, *dropped), factor in zip(groups, how.factors, strict=True):
            by[kept], by[dropped] = factor, 0.0
        by = by.to(output.device)[:, None, None]
        # in float32 at least: a factor of 2.01 is none of bfloat16
        return torch.where(by == 0, 0, output * by).to(output.dtype)

    return rewrite_attention(model, anatomy, after=merged, stack=stack.name, layer=layer, part=how.part)


def _mask_sink(
    model: nn.Module, anatomy: Anatomy, stack: Stack, layer: int, how: Intervention, told: RealTokens
) -> Edit:
    def before(call: Call) -> Call:
        _, keys = real_in(call, anatomy, stack, told)
        same = not call.place.part.startswith("cross")
        hidden = hidden_keys(call, keys, how.position, same=same, causal=stack.causal)
        return hide(call, hidden, _checked(how.heads, call))

    return rewrite_attention(model, anatomy, before=before, stack=stack.name, layer=layer, part=how.part)


def _stream_means(
    model: nn.Module, anatomy: Anatomy, stack: Stack, layer: int, how: Intervention, told: RealTokens
) -> Edit:
    def means(X: Tensor) -> Tensor:
        return sequence_means(X, told.of(stack, X.shape[0], X.shape[1], X.device), causal=stack.causal)

    return replace_stream(model, anatomy, means, stack=stack.name, layer=layer)


def _deflate_attention(
    model: nn.Module, anatomy: Anatomy, stack: Stack, layer: int, how: Intervention, told: RealTokens
) -> Edit:
    def without(call: Call, output: Tensor) -> Tensor:
        return deflated(call, output, real_in(call, anatomy, stack, told), heads=_checked(how.heads, call))

    return rewrite_attention(model, anatomy, after=without, stack=stack.name, layer=layer, part=how.part)


_MAKERS: Final[dict[Kind, Maker]] = {
    "skip-block": _skip_block,
    "zero-head": _zero_head,
    "mean-head": _mean_head,
    "merge-heads": _merge_heads,
    "mask-sink": _mask_sink,
    "stream-means": _stream_means,
    "deflate-attention": _deflate_attention,
}


def groups_of(intervention: Intervention) -> tuple[tuple[int, ...], ...]:
    """The groups of `merge-heads`.

    Args:
        intervention: with its groups.

    Returns:
        The same.

    Raises:
        EditError: where there are none, a group has one head, a head is in two groups, or more layers are meant.
    """
    groups, heads = intervention.groups, [head for group in intervention.groups for head in group]
    if intervention.also or not groups or min(map(len, groups)) < 2 or len(set(heads)) < len(heads):
        raise EditError(
            f"groups={groups}: heads of one layer are merged, in groups of two or more, each in one of them."
        )
    return groups


def _checked(heads: tuple[int, ...], call: Call) -> tuple[int, ...]:
    rows = call.query if call.query is not None else call.logits
    assert rows is not None
    if any(not 0 <= head < rows.shape[1] for head in heads):
        asked = ", ".join(map(str, heads))
        raise EditError(f"heads {asked} were asked for; attention in {call.place.path} has 0 to {rows.shape[1] - 1}.")
    return heads


def real_in(call: Call, anatomy: Anatomy, stack: Stack, told: RealTokens) -> tuple[Tensor | None, Tensor | None]:
    """(batch, queries) and (batch, keys), which are real; None for all. What was told counts before what masks show."""
    rows = call.query if call.query is not None else call.logits
    assert rows is not None
    batch, device, cross = rows.shape[0], call.value.device, call.place.part.startswith("cross")
    queries = told.of(stack, batch, call.queries, device)
    others = [one for one in anatomy.stacks if one is not stack] if cross else [stack]
    found = [mask for one in others if (mask := told.of(one, batch, call.keys, device)) is not None]
    keys = found[0] if found else None
    if keys is None and (visible := call.visible()) is not None:
        seen = visible.expand(visible.shape[0], -1, call.queries, call.keys).any(-2).any(1)
        keys = None if bool(seen.all()) else seen.expand(batch, -1)
    if queries is None and not cross and call.queries == call.keys:
        queries = keys
    return queries, keys
