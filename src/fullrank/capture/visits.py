"""The tree of module calls of one forward: who was called inside whom, in which order, with which stream."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.calls import KernelCall
from fullrank.capture.lineage import Node
from fullrank.capture.marks import OUTSIDE
from fullrank.capture.residual import ResidualTrace, is_norm
from fullrank.capture.tap import Tap
from fullrank.capture.tensors import first_state, place_of, stream_input, tensors_in

__all__ = ["Attended", "CallTree", "Group", "Visit", "groups_of"]


_MOST_WEIGHTS = 512


def _is_layer(module: nn.Module) -> bool:
    """A matrix or a kernel of a convolution, and no module inside."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim > 1 and next(module.children(), None) is None


@dataclass(frozen=True)
class Attended:
    """One attention call of the survey, as far as discovery needs it."""

    call: KernelCall
    heads: int | None
    causal: bool
    path: str
    node: Node | None = None


@dataclass(eq=False)
class Visit:
    """One call of a module.

    Attributes:
        module: the module.
        path: its name.
        parent: the visit it happened inside.
        shape: of the stream it was called with, and of what it returned.
        chained: whether it was called with the very tensor that its sibling before it returned.
        derived: whether what it was called with was computed from the stream of a sibling before it.
        follows: the visits that returned the very tensor it was called with, innermost first.
        residual: whether what it returned is what it was called with plus something.
        attended: attention calls made inside it, in order, those of inner modules included.
        input_kind: `vision` where it was called with images, `text` where with token ids.
        given: the stream itself, while the module runs.
        weight: its own source, as a bit, where it is a layer of weights; 0 elsewhere.
        reads: the sources of the stream it was called with.
        hands: the visits inside it that returned the very tensor that it returned.
        at: the place or name under which its stream is passed, where it is not the first that could be.
        shapes: of all tensors that it was called with, by place or name.
        unread: whether a softmax over more than one row was seen in it that is no attention we can read.
        batch_first: what an `nn.MultiheadAttention` inside says about its axes.
    """

    module: nn.Module
    path: str
    parent: Visit | None
    shape: torch.Size | None = None
    returned: torch.Size | None = None
    chained: bool = False
    derived: bool = False
    follows: tuple[Visit, ...] = ()
    residual: bool = False
    unread: bool = False
    weight: int = 0
    reads: int = 0
    hands: tuple[Visit, ...] = ()
    at: int | str | None = None
    shapes: dict[int | str, torch.Size] = field(default_factory=dict)
    attended: list[Attended] = field(default_factory=list)
    input_kind: str | None = None
    batch_first: bool | None = None
    given: Tensor | None = None

    def ancestors(self) -> Iterator[Visit]:
        """The visits around this one, innermost first."""
        visit = self.parent
        while visit is not None:
            yield visit
            visit = visit.parent


@dataclass(eq=False)
class Group:
    """Children of one container that were called: candidates for the blocks of a stack."""

    container: nn.Module
    bit: int
    visits: list[Visit] = field(default_factory=list)

    @property
    def attending(self) -> list[Visit]:
        """The visits with attention in them."""
        return [visit for visit in self.visits if visit.attended]

    def of_one_class(self) -> bool:
        """Whether all members are of one class."""
        return len({type(visit.module) for visit in self.visits}) == 1

    def in_sequence(self) -> bool:
        """Whether the members act on one stream: half of them get what the one before returned, or add to it."""
        several = len(self.visits) - 1
        chained, residual = (sum(getattr(v, name) for v in self.visits) for name in ("chained", "residual"))
        return several == 0 or 2 * chained >= several or 2 * residual >= several


class CallTree:
    """Records the visits of one forward through hooks that the survey installs.

    Args:
        groups: candidate containers by child module.
        tap: follows what is done with the streams of candidate groups.
    """

    def __init__(self, groups: dict[nn.Module, Group], tap: Tap) -> None:
        self.visits: list[Visit] = []
        self._open: list[Visit] = []
        self._groups = groups
        self._tap = tap
        self._traces: dict[Visit, ResidualTrace] = {}
        self._handed_on: dict[Group, Tensor] = {}
        self._weights: list[Visit] = []
        self._next_bit = max((group.bit for group in groups.values()), default=OUTSIDE) << 1
        self._returned: dict[int, tuple[weakref.ref[Tensor], tuple[Visit, ...]]] = {}

    @property
    def current(self) -> Visit | None:
        """The innermost module that runs now."""
        return self._open[-1] if self._open else None

    def enter(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        stream = stream_input(args, kwargs)
        visit = Visit(module, path, self.current, None if stream is None else stream.shape, given=stream)
        visit.input_kind = _input_kind(args, kwargs)
        if isinstance(module, nn.MultiheadAttention):
            for outer in (visit, *visit.ancestors()):
                outer.batch_first = module.batch_first
        self._open.append(visit)
        self.visits.append(visit)
        self._tap.softmaxes.where = path
        if stream is not None and len(self._weights) < _MOST_WEIGHTS and _is_layer(module):
            visit.weight, visit.reads = self._next_bit << len(self._weights), self._tap.marks.of(stream)
            self._weights.append(visit)
        group = self._groups.get(module)
        if group is not None and stream is not None:
            stream = self._handed_to(group, visit, args, kwargs, stream)
            visit.chained = self._handed_on.get(group) is stream
            visit.derived = bool(self._tap.marks.of(stream) & group.bit)
            visit.follows = self._who_returned(stream)
            group.visits.append(visit)
            self._tap.marks.enter(stream, group.bit, args, kwargs)
            self._traces[visit] = ResidualTrace(stream)
            self._tap.traces.append(self._traces[visit])

    def leave(self, module: nn.Module, output: Any) -> None:
        """A module returns, or is left by an exception."""
        visit = self._open.pop()
        self._tap.softmaxes.where = self._open[-1].path if self._open else ""
        state = first_state(output)
        visit.returned = None if state is None else state.shape
        if not self._traces or list(self._traces) == [visit]:
            unused = self._tap.softmaxes.take_unused()  # a whole block is over: let go of the inputs
            visit.unread = any(len(shape) > 2 and shape[-2] > 1 for shape in unused)
        trace = self._traces.pop(visit, None)
        if trace is not None:
            self._tap.traces.remove(trace)
            visit.residual = trace.adds_to_input(state)
        for outer in self._tap.traces if is_norm(module) and visit.given is not None else ():
            outer.see_norm(visit.given, output)
        visit.given = None
        group = self._groups.get(module)
        if group is not None and state is not None:
            self._handed_on[group] = state
        if state is not None:
            visit.hands = self._who_returned(state)
            if visit.weight:
                self._tap.marks.add(state, visit.weight)
            if visit.weight or group is not None:
                self._returned[id(state)] = (weakref.ref(state), (*visit.hands, visit))

    def set_pieces_apart(self) -> tuple[str, ...]:
        """Take back the maps of modules whose attention is made of several maps, of which not all could be read.

        Returns:
            Names of these modules.
        """
        pieces = self._tap.softmaxes.pieces
        apart: dict[str, None] = {}
        for visit in self.visits:
            whole = [a for a in visit.attended if a.call.weights is None or a.path not in pieces]
            apart |= dict.fromkeys(a.path for a in visit.attended if a not in whole)
            visit.unread |= len(whole) < len(visit.attended)
            visit.attended = whole
        return tuple(apart)

    def attend(self, attended: Attended) -> None:
        """An attention call happens in the current visit."""
        if self.current is not None:
            for visit in (self.current, *self.current.ancestors()):
                visit.attended.append(attended)

    def _handed_to(
        self, group: Group, visit: Visit, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor
    ) -> Tensor:
        """The stream of a member of a group: what the one before returned, wherever it is passed."""
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        visit.shapes = {place: item.shape for place, item in places if isinstance(item, Tensor)}
        handed = self._handed_on.get(group)
        at = None if handed is None or handed is stream else place_of(handed, args, kwargs)
        before = group.visits[-1] if group.visits else None
        if at is None or handed is None or before is None:
            return stream
        if before.at != at and (before.shape == before.returned or before.shapes.get(at) != before.returned):
            return (
                stream  # the one before did act on its first tensor: this one is given the stream pooled, or beside it
            )
        for one in (*group.visits, visit):
            if one.at != at:  # of the first, another tensor was taken for its stream
                one.at, one.shape, one.follows = at, one.shapes.get(at, one.shape), ()
        visit.given = handed
        return handed

    def _who_returned(self, tensor: Tensor) -> tuple[Visit, ...]:
        found = self._returned.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else ()

    @property
    def weights(self) -> list[Visit]:
        """The calls of layers of weights in order; none where there are so many that they are no plain chain."""
        return self._weights if len(self._weights) < _MOST_WEIGHTS else []


def groups_of(model: nn.Module) -> dict[nn.Module, Group]:
    """Children of module lists and of plain sequences, by child; each list is one candidate group.

    Returns:
        The group of every such child. A child of two lists belongs to the first; lists of lists, which nobody calls,
        are one group.
    """
    found: dict[nn.Module, Group] = {}
    bit = OUTSIDE << 1
    for container in model.modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        group = found.get(container) if isinstance(container, nn.ModuleList) else None
        if group is None or isinstance(group.container, nn.Sequential):
            group = Group(container, bit)
            bit <<= 1
        for child in container.children():
            found.setdefault(child, group)
    return found


_TEXT = frozenset({"input_ids", "decoder_input_ids"})  # embeddings go by one name for tokens and for patches


def _input_kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    named = {name for name, value in kwargs.items() if isinstance(value, Tensor)}
    vision = any("pixel" in name for name in named) or any(_is_image(item) for item in args)
    text = bool(named & _TEXT) or any(not t.is_floating_point() and t.ndim == 2 for t in tensors_in(args[:1]))
    if vision == text:
        return None
    return "vision" if vision else "text"


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 4 and value.shape[1] == 3
