"""One forward under observation: where the blocks are and where attention happens in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fullrank.capture.anatomy import Anatomy, Stack, stack_names
from fullrank.capture.assign import Call, Spans, block_roles, model_roles
from fullrank.capture.axes import axes_of
from fullrank.capture.blocks import find_stacks, named_blocks
from fullrank.capture.calls import KernelCall, shapes_only
from fullrank.capture.chain import chain_of
from fullrank.capture.dispatch import overriding
from fullrank.capture.layout import Layout
from fullrank.capture.lineage import Lineage
from fullrank.capture.marks import OUTSIDE
from fullrank.capture.reading import MaskReader, Unreadable, looks_back, shape_of
from fullrank.capture.reference import module_names, reference_path
from fullrank.capture.tap import Tap, heads_of
from fullrank.capture.tokens import over_tokens
from fullrank.capture.unfound import why_no_blocks
from fullrank.capture.visits import Attended, CallTree, Group, Visit, groups_of
from fullrank.errors import ModelError

__all__ = ["Forward", "followed", "survey", "watch"]

PIECES = (
    "attention in {first}{others} is not reported: it is put together from several softmaxes (landmarks, sparse "
    "blocks), of which none is its map."
)
CHAIN = (
    "there are no repeated blocks: the layers of the network are its {layers} layers of weights, each with what "
    "follows it."
)


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward that was surveyed, as long as somebody wants to follow its calls.

    Attributes:
        anatomy: what was found.
        visits: for each stack the calls of its blocks.
        spans: where in the lineage the calls of all modules lie.
    """

    anatomy: Anatomy
    visits: tuple[tuple[Visit, ...], ...]
    spans: Spans


def survey(model: nn.Module, forward: Callable[[], Any], *, blocks: str | None = None) -> Anatomy:
    """Run one forward and find the stacks of blocks in it.

    Nothing is asked of names or classes: blocks are the children of module lists or sequences that hand the stream on
    to each other, in the order they are called; a shared block that is called n times is n layers.

    Args:
        model: the model that `forward` runs.
        forward: one forward pass. Wrap it in `undisturbed` where the model must stay as it is.
        blocks: path of the list of blocks, or a pattern of module names, or several separated by commas, where they
            are not found by themselves.

    Returns:
        The stacks, with the attention calls of each block.

    Raises:
        ModelError: where no blocks are found, or the named ones are not called.
    """
    return watch(model, forward, blocks=blocks).anatomy


def watch(model: nn.Module, forward: Callable[[], Any], *, blocks: str | None = None) -> Forward:
    """As `survey`, with the lineage of the forward that it ran.

    Args:
        model: the model that `forward` runs.
        forward: one forward pass.
        blocks: as in `survey`.

    Returns:
        What was found, and where it was found.

    Raises:
        ModelError: as `survey`.
    """
    if blocks is not None:
        chosen = named_blocks(model, blocks)
        shared = [Group(nn.ModuleList(), OUTSIDE << (index + 1)) for index in range(len(chosen))]
        groups = {module: group for group, modules in zip(shared, chosen, strict=True) for module in modules}
    else:
        groups = groups_of(model)
    notes: list[str] = []
    tree, spans = followed(model, forward, groups, notes)
    unique = list({id(group): group for group in groups.values()}.values())
    if blocks is not None:
        stacks = [group.visits for group in unique if group.visits]
        if not stacks:
            raise ModelError(f"blocks={blocks!r} names modules of this {type(model).__name__} that no forward calls.")
    else:
        stacks = find_stacks(unique)
    attends = any(visit.attended or visit.unread for visit in tree.visits)
    chain = chain_of(tree.weights) if not stacks and not attends else None
    if chain is not None:
        stacks = [chain[0]]
        notes.append(CHAIN.format(layers=len(chain[0])))
    if not stacks:
        raise ModelError(why_no_blocks(model, unique, tree.visits))
    called = {id(visit): index for index, visit in enumerate(tree.visits)}
    stacks = [sorted(visits, key=lambda visit: called[id(visit)]) for visits in stacks]
    stacks.sort(key=lambda visits: called[id(visits[0])])
    bits = {id(v): group.bit for group in unique for v in group.visits}
    apart = tree.set_pieces_apart()
    if apart:
        notes.append(PIECES.format(first=apart[0], others=f" and {len(apart) - 1} more" if len(apart) > 1 else ""))
    anatomy = replace(_describe(stacks, notes, bits, model, spans), apart=apart)
    if chain is not None:
        anatomy = replace(anatomy, stacks=(replace(anatomy.stacks[0], end=chain[1]),))
    return Forward(anatomy, tuple(map(tuple, stacks)), spans)


def followed(
    model: nn.Module, forward: Callable[[], Any], groups: dict[nn.Module, Group], notes: list[str]
) -> tuple[CallTree, Spans]:
    """Run one forward and write down its module calls and the lineage of its tensors.

    Args:
        model: the model that `forward` runs.
        forward: one forward pass.
        groups: candidates for blocks.
        notes: takes sentences about what was switched off.

    Returns:
        The calls, and where in the lineage they lie.
    """
    masks = MaskReader()

    def on_call(call: KernelCall) -> None:
        visit = tree.current
        heads = next((h for v in _around(visit) if (h := heads_of(v.module))), None)
        node = spans.lineage.last_attention
        tree.attend(Attended(shapes_only(call), heads, looks_back(call, masks), visit.path if visit else "", node))

    tap = Tap(on_call, lambda sentence: None)
    tree = CallTree(groups, tap)
    tap.lineage = Lineage(model, lambda: None if tree.current is None else (tree.current.module, tree.current.path))
    spans = Spans(tap.lineage)
    names = module_names(model)
    with ExitStack() as put_back, torch.no_grad():
        tap.stance = put_back.enter_context(reference_path(model, notes))
        for module, name in names.items():
            hooks = _hooks(tree, spans, name, module in groups)
            put_back.callback(module.register_forward_pre_hook(hooks[0], with_kwargs=True).remove)
            put_back.callback(module.register_forward_hook(hooks[1], always_call=True).remove)
        put_back.enter_context(overriding(model, tap))
        put_back.enter_context(tap)
        forward()
    return tree, spans


def _hooks(tree: CallTree, spans: Spans, name: str, member: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tree.enter(module, name, args, kwargs)
        spans.enter(tree.current, args, kwargs, member=member)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        spans.leave(tree.current, output)
        tree.leave(module, output)

    return enter, leave


def _around(visit: Visit | None) -> list[Visit]:
    return [] if visit is None else [visit, *visit.ancestors()]


# ---------------------------------------------------------------- describing


def _describe(
    stacks: list[list[Visit]], notes: list[str], bits: dict[int, int], model: nn.Module, spans: Spans
) -> Anatomy:
    found: list[tuple[list[Visit], list[list[tuple[str, Attended]]], Layout]] = []
    for visits in stacks:
        layout = Layout(axes_of(visits), _tokens_first(visits, notes))
        own = 0
        for visit in visits:
            own |= bits.get(id(visit), 0)
        parts = [_parts(visit, own, layout) for visit in visits]
        found.append((visits, parts, layout))
    causal = [_is_causal(parts) for _, parts, _ in found]
    roles = [
        {part.split(".")[0] for block in parts for part, _ in block}
        | ({"causal"} if back else set())
        | ({"unread"} if any(visit.unread for visit in visits) else set())
        for (visits, parts, _), back in zip(found, causal, strict=True)
    ]
    names = stack_names([visits[0] for visits, _, _ in found], roles)
    described = []
    for (visits, parts, layout), name, back in zip(found, names, causal, strict=True):
        if not any(parts) and not any(visit.unread for visit in visits):
            notes.append(f"stack {name}: no token attention was seen in its {len(visits)} blocks.")
        described.append(
            Stack(
                name=name,
                paths=tuple(visit.path for visit in visits),
                calls=tuple(tuple(part for part, _ in block) for block in parts),
                heads=_heads(visits, parts, layout),
                width=_width(visits, layout),
                causal=back,
                layout=layout,
                at=next((visit.at for visit in visits if visit.at is not None), None),
                callers=tuple(tuple(attended.path for _, attended in block) for block in parts),
                **_weights(visits, parts, layout, model, spans, [other[-1] for other in stacks if other is not visits]),
            )
        )
    return Anatomy(tuple(described), tuple(dict.fromkeys(notes)))


def _weights(
    visits: list[Visit],
    parts: list[list[tuple[str, Attended]]],
    layout: Layout,
    model: nn.Module,
    spans: Spans,
    others: list[Visit],
) -> dict[str, Any]:
    nodes = spans.lineage.nodes
    weights = tuple(
        tuple(
            block_roles(
                model,
                visit.path,
                spans.of(visit),
                [Call(part, attended.node, _query_heads(visit, attended, layout)) for part, attended in block],
                nodes,
            )
        )
        for visit, block in zip(visits, parts, strict=True)
    )
    ends = model_roles(spans.of(visits[0]), spans.of(visits[-1]), nodes, [spans.of(other) for other in others])
    return {"weights": weights} | {weight.role: weight for weight in ends}


def _query_heads(visit: Visit, attended: Attended, layout: Layout) -> int:
    try:
        return shape_of(attended.call, _batch(visit, layout), attended.heads)[1]
    except Unreadable:
        return 0


def _width(visits: list[Visit], layout: Layout) -> int:
    """Features of a token; of a sample, after the first block: the first one may take in images."""
    shape = next((visit.shape for visit in visits if visit.shape is not None), None)
    if layout.axes == "samples":
        shape = next((visit.shape for visit in visits[1:] if visit.shape is not None), shape)
        return 0 if shape is None else shape[1:].numel()
    return 0 if shape is None else layout.sizes(shape)[2]


def _parts(visit: Visit, own: int, layout: Layout) -> list[tuple[str, Attended]]:
    counts = {"self": 0, "cross": 0}
    parts = []
    for attended in visit.attended:
        if not over_tokens(attended.call, visit.shape, attended.heads, layout):
            continue
        kind = "self" if attended.call.sources & own or not attended.call.sources else "cross"
        parts.append((f"{kind}.{counts[kind]}" if counts[kind] else kind, attended))
        counts[kind] += 1
    return parts


def _is_causal(parts: list[list[tuple[str, Attended]]]) -> bool:
    own = [attended for block in parts for part, attended in block if part.startswith("self")]
    return bool(own) and all(attended.causal for attended in own)


def _heads(visits: list[Visit], parts: list[list[tuple[str, Attended]]], layout: Layout) -> int | None:
    heads = (_query_heads(v, attended, layout) for v, block in zip(visits, parts, strict=True) for _, attended in block)
    return next(filter(None, heads), None)


def _batch(visit: Visit, layout: Layout) -> int:
    assert visit.shape is not None
    return layout.sizes(visit.shape)[0]


def _tokens_first(visits: list[Visit], notes: list[str]) -> bool:
    """Whether streams are (tokens, sequences, width): said by `nn.MultiheadAttention`, else seen from the calls."""
    for visit in visits:
        if visit.batch_first is not None:
            return not visit.batch_first
    for visit in visits:
        if visit.shape is None or len(visit.shape) != 3:
            continue
        first, second = visit.shape[:2]
        for attended in visit.attended:
            call = attended.call
            rows = call.weights if call.weights is not None else call.query
            if rows is None or rows.ndim != 4:
                continue
            if first == second:
                notes.append(
                    f"there are as many sequences as tokens ({first}) in {visit.path}: the first axis is taken for the "
                    "sequences."
                )
                return False
            if (rows.shape[0], rows.shape[-2]) == (second, first):
                return True
            if (rows.shape[0], rows.shape[-2]) == (first, second):
                return False
    return False
