"""Which modules are the blocks of the model's stacks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn

from fullrank.capture.visits import Group, Visit
from fullrank.errors import ModelError

__all__ = ["find_stacks", "named_blocks"]

NOT_FOUND = (
    "no repeated blocks were found in this {model}; name the list that holds them, such as blocks='transformer.h', "
    "or a pattern of module names, such as blocks='layer_*'."
)


def find_stacks(groups: Iterable[Group]) -> list[list[Visit]]:
    """The stacks of one forward, each as the calls of its blocks in order.

    Candidates are the children of module lists and sequences that were called one after the other. Of candidates
    inside one another the outermost wins (a T5 block holds a list of sublayers, a mixture holds a list of experts),
    unless the inner ones are blocks themselves: of one class, each with attention of its own, handing the stream on to
    each other, and together more than the outer ones and all of their attention (the stages of Swin).

    Args:
        groups: the candidates, with their calls.

    Returns:
        Stacks in order of their first call.
    """
    candidates = [trimmed for group in groups if (trimmed := _trimmed(group)).visits]
    attending = [group for group in candidates if group.attending and group.in_sequence()]
    if not attending and any(group.attending for group in candidates):
        return []  # lists of sublayers side by side: what goes through them is not the residual stream
    if not attending:
        return _without_attention(candidates)
    stacks = []
    for group in _outermost(attending):
        inner = _blocks_inside(group, attending)
        stacks.append(inner if inner else list(group.visits))
    stacks.extend(group.visits for group in _unread_beside(candidates, attending))
    return _in_turns(_stages(stacks, candidates))


def named_blocks(model: nn.Module, blocks: str) -> list[list[nn.Module]]:
    """The modules that a user named: paths of lists or patterns of module names, separated by commas.

    Args:
        model: the model.
        blocks: such as `transformer.h`, `encoder.layers,decoder.layers` or `layer_*`.

    Returns:
        For each path or pattern its modules.

    Raises:
        ModelError: where a path or pattern matches nothing.
    """
    names = dict(model.named_modules())
    stacks = []
    for pattern in (part.strip() for part in blocks.split(",")):
        named = names.get(pattern)
        if isinstance(named, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            found = list(named.children())
        else:
            found = [module for name, module in names.items() if _matches(name, pattern)]
        if not found:
            lists = [name for name, module in names.items() if isinstance(module, nn.ModuleList | nn.Sequential)]
            have = ", ".join(lists[:6]) or "none"
            raise ModelError(
                f"blocks={pattern!r} matches no module of this {type(model).__name__}; its lists are: {have}."
            )
        stacks.append(found)
    return stacks


def _matches(name: str, pattern: str) -> bool:
    """Part by part: a star does not reach into a module's children."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _trimmed(group: Group) -> Group:
    """Of a plain sequence, the members of the classes that repeat: an embedding or a head is no block."""
    if not isinstance(group.container, nn.Sequential) or group.of_one_class():
        return group
    attending = {type(visit.module) for visit in group.attending}
    counts: dict[type, int] = {}
    for visit in group.visits:
        counts[type(visit.module)] = counts.get(type(visit.module), 0) + 1
    kept = attending or {kind for kind, count in counts.items() if count > 1}
    return Group(group.container, group.bit, [visit for visit in group.visits if type(visit.module) in kept])


def _inside(inner: Group, outer: Group) -> bool:
    members = {id(visit) for visit in outer.visits}
    return inner is not outer and any(id(a) in members for visit in inner.visits for a in visit.ancestors())


def _outermost(groups: list[Group]) -> list[Group]:
    return [group for group in groups if not any(_inside(group, other) for other in groups)]


def _blocks_inside(outer: Group, groups: list[Group]) -> list[Visit]:
    """The blocks that the members of a group hold, or none where the members are blocks themselves."""
    inner = [
        group
        for group in groups
        if _inside(group, outer)
        and group.of_one_class()
        and len(group.attending) == len(group.visits)
        and _hands_on(group)
    ]
    inner = _outermost(inner)
    if not inner:
        return []
    visits = [visit for group in inner for visit in group.visits]
    calls = sum(len(visit.attended) for visit in visits)
    if len(visits) <= len(outer.visits) or calls < sum(len(visit.attended) for visit in outer.visits):
        return []
    deeper = [_blocks_inside(group, groups) for group in inner]
    return [visit for group, found in zip(inner, deeper, strict=True) for visit in (found or group.visits)]


def _unread_beside(candidates: list[Group], attending: list[Group]) -> list[Group]:
    """Stacks of a model that attends elsewhere, whose own attention was seen but cannot be read."""
    chosen = [
        group
        for group in candidates
        if not group.attending
        and any(visit.unread for visit in group.visits)
        and len(group.visits) > 1
        and group.of_one_class()
        and group.in_sequence()
        and not any(_inside(group, other) or _inside(other, group) for other in attending)
    ]
    return _outermost(chosen)


def _stages(stacks: list[list[Visit]], groups: list[Group]) -> list[list[Visit]]:
    """One stack where each stage of a list holds one, and each stage reads what the stage before it made."""
    for group in groups:
        if len(group.visits) < 2 or not group.of_one_class() or not all(visit.derived for visit in group.visits[1:]):
            continue
        held = [[stack for stack in stacks if _all_inside(stack, stage)] for stage in group.visits]
        if any(len(inside) > 1 for inside in held) or sum(map(len, held)) < 2:
            continue
        stages = [stack for inside in held for stack in inside]
        stacks = [stack for stack in stacks if not any(stack is stage for stage in stages)]
        stacks.append([visit for stage in stages for visit in stage])
    return stacks


def _all_inside(stack: list[Visit], outer: Visit) -> bool:
    return all(any(around is outer for around in visit.ancestors()) for visit in stack)


def _in_turns(stacks: list[list[Visit]]) -> list[list[Visit]]:
    """One stack where the blocks of two lists hand the very same tensor on to each other, by turns or at the end."""
    joined: list[list[Visit]] = []
    for stack in stacks:
        members = {id(visit) for visit in stack}
        linked = [
            other
            for other in joined
            if any(id(before) in members for visit in other for before in visit.follows)
            or any(before is visit for visit in other for later in stack for before in later.follows)
        ]
        joined = [other for other in joined if not any(other is one for one in linked)]
        joined.append([visit for one in (*linked, stack) for visit in one])
    return joined


def _hands_on(group: Group) -> bool:
    # parallel attention modules in a list are of one class too, but do not feed each other
    return len(group.visits) == 1 or any(visit.chained or visit.residual for visit in group.visits)


def _without_attention(groups: list[Group]) -> list[list[Visit]]:
    """A state-space or convolutional model: of the outermost lists, stages put together, the one of most weights."""
    kept = [group for group in groups if group.of_one_class() and group.in_sequence() and _keeps_shape(group.visits)]
    kept = [group for group in kept if not _of_stages(group, kept)]
    stacks = _in_turns(_stages([group.visits for group in _outermost(kept)], groups))
    stacks = [visits for visits in stacks if len(visits) > 1]
    return [max(stacks, key=_weights)] if stacks else []


def _keeps_shape(visits: list[Visit]) -> bool:
    # the first block of a list may change it
    known = all(visit.shape is not None and visit.returned is not None for visit in visits)
    first = visits[0].shape == visits[0].returned or visits[0].returned == visits[min(1, len(visits) - 1)].shape
    return known and first and all(visit.shape == visit.returned for visit in visits[1:])


def _of_stages(outer: Group, groups: list[Group]) -> bool:
    # one of them changes the shape, and they hold lists of blocks that add to their input
    if all(visit.shape == visit.returned for visit in outer.visits):
        return False
    return any(
        _inside(group, outer) and 2 * sum(v.residual for v in group.visits) >= len(group.visits) for group in groups
    )


def _weights(visits: list[Visit]) -> int:
    members = {id(visit.module): visit.module for visit in visits}
    return sum(parameter.numel() for module in members.values() for parameter in module.parameters())
