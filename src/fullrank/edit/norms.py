"""The norms of a model: where they stand in the blocks, and which modules compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullrank.capture.additions import Unfollowed, sums_of
from fullrank.capture.anatomy import Anatomy, Stack
from fullrank.capture.assign import Span, Spans
from fullrank.capture.lineage import Ref
from fullrank.capture.replay import Replay
from fullrank.capture.survey import followed
from fullrank.capture.undisturbed import undisturbed
from fullrank.capture.upstream import CARRIED, Region
from fullrank.capture.visits import Visit, groups_of
from fullrank.capture.ways import MOVES
from fullrank.edit.branches import Branch, Branches
from fullrank.edit.norm_kinds import NORMS, Kind, Unseen, awake, kind_between
from fullrank.edit.norm_roles import BlockRoles, Role
from fullrank.spec.subject import device_of

__all__ = ["Norm", "Norms", "find_norms"]


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream, or of what is added to it.

    Attributes:
        stack: name of the stack.
        layer: n for the n-th block call.
        branch: the branch that it belongs to, as in `Branch`; empty for the one after the last block.
        role: `read`: the branch reads the stream through it (pre-norm); `sum`: it normalises the stream after the
            branch was added (post-norm); `branch`: it normalises what the branch adds (peri-norm); `final`: it
            normalises the stream after the last block.
        path: name of the module; empty where the block calls functions.
        kind: `layer`: tokens minus their mean over features, at rms 1; `rms`: tokens at rms 1; `batch`: features with
            the statistics of a batch, or running ones; `other`: something else that does not change with their size.
        width: features that it normalises over.
        eps: what is added to the mean square; NaN where it cannot be told.
        calls: how often the module is called in one forward, for whatever; 1 where it is none.
    """

    stack: str
    layer: int
    branch: str
    role: Role
    path: str
    kind: Kind
    width: int
    eps: float
    calls: int = 1


@dataclass(frozen=True)
class Norms:
    """The norms of a model, and what could not be told.

    Attributes:
        found: in the order of the forward. A norm that several branches read is there for each of them.
        notes: a sentence for each block whose norms could not be told.
    """

    found: tuple[Norm, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Norm]:
        return iter(self.found)

    def of(self, stack: str, layer: int) -> tuple[Norm, ...]:
        """Those of one block call, the one after the last block included."""
        return tuple(norm for norm in self.found if (norm.stack, norm.layer) == (stack, layer))


def find_norms(model: nn.Module, forward: Callable[[], Any], anatomy: Anatomy, branches: Branches) -> Norms:
    """Run one forward and find the norms between the stream and its branches.

    The tensors of a block are followed from sum to sum; what lies between two of them is a norm if it makes of random
    tokens what a norm makes of them. Parameters that are 0 throughout, as gains of norms and branches are at first in
    some models, hide none: they are taken for 1. No name and no class of a module is asked. Norms inside branches, as
    of queries and keys, are none of these.

    Args:
        model: the model; it is run in evaluation mode and left as it was.
        forward: one forward pass.
        anatomy: what `capture.survey` found in the same forward.
        branches: what `find_branches` found.

    Returns:
        The norms.
    """
    with undisturbed(model):
        tree, spans = followed(model, forward, groups_of(model), [])
        finder = _Finder(model, tree.visits, spans, branches)
        for stack in anatomy.stacks:
            finder.look(stack)
    return Norms(tuple(finder.found), tuple(dict.fromkeys(finder.notes)))


@dataclass(frozen=True)
class _Candidate:
    """What may be a norm: from one tensor to another, in a module or in a function that is called outside of one."""

    path: str
    start: Ref
    end: Ref
    kind: Kind
    eps: float


class _Finder:
    def __init__(self, model: nn.Module, visits: list[Visit], spans: Spans, branches: Branches) -> None:
        self.found: list[Norm] = []
        self.notes: list[str] = []
        self._visits, self._spans, self._branches = visits, spans, branches
        self._nodes = spans.lineage.nodes
        self._replays, self._device = (Replay(model), Replay(model, instead=awake)), device_of(model)
        self._at = ""  # the block that is looked at
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._kinds: dict[tuple[int, int, int, int], tuple[Kind, float] | None] = {}

    def look(self, stack: Stack) -> None:
        """Find the norms of one stack."""
        calls = [visit for visit in self._visits if visit.path in stack.paths][: len(stack.paths)]
        span: Span | None = None
        for index, visit in enumerate(calls):
            self._at = visit.path
            span = self._spans.of(visit)
            stream = None if span is None else span.places.get(stack.at, span.stream)  # type: ignore[arg-type]
            names = self._branches.of(stack.name, index + 1)
            if span is None or stream is None or span.output is None or not names:
                self.notes.append(f"the norms of block {visit.path} are not known: its branches were not found.")
                continue
            region = Region(self._nodes, span.first, span.last, span.given)
            try:
                sums = sums_of(region, stream, span.output)
            except Unfollowed as reason:
                self.notes.append(f"the norms of block {visit.path} are not known: {reason}.")
                continue
            inside = [other for other in self._visits if visit in other.ancestors()]
            block = BlockRoles(region, sums, list(names.values()), self._leaves(inside, names.values()))
            found = [(candidate, role) for candidate, role in self._in_block(block, inside)]
            for candidate, (role, name) in sorted(found, key=lambda each: each[0].end.node.order):
                self._add(stack, index + 1, name, role, candidate)
        self._at = ""
        if span is not None and span.output is not None:
            last = self._after(span.output)
            if last is not None:
                self._add(stack, len(stack.paths), "", "final", last)

    def _add(self, stack: Stack, layer: int, name: str, role: Role, norm: _Candidate) -> None:
        width = norm.start.shape[-1]
        calls = sum(visit.path == norm.path for visit in self._visits) if norm.path else 1
        self.found.append(Norm(stack.name, layer, name, role, norm.path, norm.kind, width, norm.eps, calls))

    def _leaves(self, inside: list[Visit], branches: Iterable[Branch]) -> dict[str, Ref]:
        found = {}
        for branch in branches:
            for visit in inside:
                span = self._spans.of(visit)
                if visit.path == branch.path and span is not None and span.output is not None:
                    found[branch.name] = span.output
        return found

    def _in_block(self, block: BlockRoles, inside: list[Visit]) -> Iterator[tuple[_Candidate, tuple[Role, str]]]:
        told: set[tuple[Role, str]] = set()
        for path, start, end in self._segments(block, inside):
            roles = block.roles(start, end)
            kind = self._kind(start, end) if roles else None
            if kind is None:
                continue
            for role in roles:
                told.add(role)
                yield _Candidate(path, start, end, *kind), role
        for role, start, end in block.bare():  # written out in the block itself
            kind = self._kind(start, end) if role not in told else None
            if kind is not None:
                told.add(role)
                yield _Candidate("", start, end, *kind), role

    def _segments(self, block: BlockRoles, inside: list[Visit]) -> Iterator[tuple[str, Ref, Ref]]:
        """Module calls that may be norms, outermost first, and functions outside of these."""
        taken: list[tuple[int, int]] = []
        for visit in inside:
            span = self._spans.of(visit)
            if span is None or span.stream is None or span.output is None:
                continue
            within = any(first <= span.first and span.last <= last for first, last in taken)
            if within or not block.roles(span.stream, span.output) or self._kind(span.stream, span.output) is None:
                continue
            taken.append((span.first, span.last))
            yield visit.path, span.stream, span.output
        for node in block.region.calls:
            if node.name in NORMS and node.parents and not any(a <= node.order < b for a, b in taken):
                yield "", node.parents[0], node.out

    def _kind(self, start: Ref, end: Ref) -> tuple[Kind, float] | None:
        key = (start.node.order, start.index, end.node.order, end.index)
        if key not in self._kinds:
            try:
                self._kinds[key] = kind_between(self._replays, start, end, dtype=self._dtype, device=self._device)
            except Unseen:
                self._kinds[key] = None
                if self._at:
                    self.notes.append(
                        f"the norms of block {self._at} are not known: something in it, perhaps a norm, returns the "
                        "same whatever it is given, as what is multiplied by 0 does."
                    )
        return self._kinds[key]

    def _after(self, output: Ref) -> _Candidate | None:
        """The norm of what the last block returned."""
        for visit in self._visits:
            span = self._spans.of(visit)
            if span is None or span.stream is None or span.output is None or span.first <= output.node.order:
                continue
            if _origin(span.stream, output) == output:
                kind = self._kind(span.stream, span.output)
                if kind is not None:
                    return _Candidate(visit.path, span.stream, span.output, *kind)
        for node in self._nodes[output.node.order + 1 :]:
            if node.name in NORMS and node.parents and _origin(node.parents[0], output) == output:
                kind = self._kind(node.parents[0], node.out)
                if kind is not None:
                    return _Candidate("", node.parents[0], node.out, *kind)
        return None


def _origin(ref: Ref, output: Ref) -> Ref:
    """The tensor before casts, views, selections and dropout, not before a given one."""
    while ref != output and (ref.node.name in CARRIED or ref.node.name in MOVES) and ref.node.parents:
        ref = ref.node.parents[0]
    return ref
