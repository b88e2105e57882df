"""Why no blocks were found in a model: one sentence for its user."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fullrank.capture.blocks import NOT_FOUND
from fullrank.capture.reference import module_names
from fullrank.capture.visits import Group, Visit

__all__ = ["why_no_blocks"]

_NOT_CALLED = (
    "no repeated blocks were found in this {model}: the modules of {path} are run by their forward method and never "
    "called themselves, so that hooks do not see them."
)
_SIDE_BY_SIDE = (
    "no repeated blocks were found in this {model}: the modules of {path} attend, but do not hand a stream on to each "
    "other; what they return is added up outside of any module."
)


def why_no_blocks(model: nn.Module, groups: Iterable[Group], visits: Iterable[Visit]) -> str:
    """What stands in the way of finding the blocks.

    Args:
        model: the model.
        groups: the candidates of the survey.
        visits: all module calls of its forward.

    Returns:
        A sentence.
    """
    kind, names, groups = type(model).__name__, module_names(model), list(groups)
    called = [visit.path for visit in visits]
    for group in groups:
        members = [names[child] for child in group.container.children() if child in names]
        if not group.visits and any(path.startswith(f"{member}.") for path in called for member in members):
            return _NOT_CALLED.format(model=kind, path=names.get(group.container, "a list"))
    for group in groups:
        if group.attending:
            return _SIDE_BY_SIDE.format(model=kind, path=names.get(group.container, "a list"))
    return NOT_FOUND.format(model=kind)
