"""Gradients of parameters: every tensor by its name, weights by their role, and how unevenly they are spread."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fullrank import metrics
from fullrank.capture import Anatomy, Stack
from fullrank.capture.events import Backward, Event, ParameterGradient, Signal
from fullrank.capture.weights import Weight, part_of, unreadable
from fullrank.measure.probed import estimate
from fullrank.measure.samples import Place
from fullrank.metrics.gradients import from_squares
from fullrank.table import Row

__all__ = ["ParameterObserver"]

_ROLES = ("q", "k", "v", "o")
_UNTOUCHED = "no gradient reaches any of its tensors"
_NO_RATIO = "no gradient reaches its values and output"


@dataclass
class _Tensor:
    """One parameter: what was gathered of its gradient."""

    place: Place
    weights: list[tuple[Place, Weight]]
    entries: int = 0
    of_weights: list[Tensor] = field(default_factory=list)  # ‖W‖ of each role
    sizes: list[int] = field(default_factory=list)  # entries of each role
    squares: list[list[Tensor]] = field(default_factory=list)  # of each backward: ‖g‖², then that of each role
    total: Tensor | None = None  # of several batches' gradients, where these are kept
    reached: bool = False  # in any batch
    reason: str = ""  # why not, where none reached it


class ParameterObserver:
    """Norms and elasticities of the gradients of all parameters.

    For the model's own loss the gradient is that of its mean over all sequences: those of several batches are added
    up, for which they are kept where there are several (a copy of the parameters). For random projections the squares
    are averaged over sequences and probes; then the standard error is over probes.

    Args:
        model: the model that was surveyed.
        anatomy: what the survey found: blocks and roles.
        several: whether there are several batches or processes.
    """

    needs: frozenset[Signal] = frozenset({"gradient"})

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, several: bool = False) -> None:
        self._tensors, self._unknown = _tensors_of(model, anatomy)
        self._stacks = {stack.name: len(stack.paths) for stack in anatomy.stacks}
        self._several = several
        self._of_loss = True
        self._sequences = 0
        self._batches = 0

    def see(self, event: Event) -> None:
        """Reduce one parameter's gradient to its norms."""
        if isinstance(event, Backward):
            self._of_loss &= event.of == "loss"
            self._sequences += event.sequences
            self._batches += 1
        elif isinstance(event, ParameterGradient) and event.name in self._tensors:
            held = self._tensors[event.name]
            held.reached |= event.value is not None and not event.reason
            held.reason = "" if held.reached else event.reason
            if event.value is None:
                return
            if not held.entries:
                held.entries = event.weight.numel()
                parts = [part_of(event.weight, weight) for _, weight in held.weights]
                held.of_weights = _norms(event.weight, held)[1:]
                held.sizes = [part.numel() for part in parts]
            if self._several and self._of_loss:
                kept = event.value.to(torch.promote_types(event.value.dtype, torch.float32))
                held.total = kept.clone() if held.total is None else held.total + kept
                return
            found = _squares(event.value, held)
            if event.backward < len(held.squares):  # another batch: independent projections add in their squares
                found = [a + b for a, b in zip(held.squares[event.backward], found, strict=True)]
                held.squares[event.backward] = found
            else:
                held.squares.append(found)

    def rows(self) -> list[Row]:
        """Every number gathered so far."""
        if not self._batches:
            return []
        gathered = {name: _gathered(held) for name, held in self._tensors.items()}
        rows = []
        by_role: dict[Place, list[_Part]] = {}
        for name, held in self._tensors.items():
            found = gathered[name]
            if found is None:
                rows.append(self._row(held.place, "gradient_norm", None, reason=held.reason))
                continue
            rows.append(self._row(held.place, "gradient_norm", torch.sqrt, self._mean(found[:, 0]), reason=held.reason))
            for index, (place, _) in enumerate(held.weights):
                part = _Part(held, held.of_weights[index], held.sizes[index], found[:, index + 1])
                by_role.setdefault(place, []).append(part)
        rows.extend(self._role_rows(by_role))
        rows.extend(
            self._row(place, "elasticity", None, reason=reason)
            for place, reason in self._unknown.items()
            if place not in by_role
        )
        for stack, depth in self._stacks.items():
            rows.append(self._spread_row(stack, depth, gathered))
        return rows

    def merge(self, other: Self) -> None:
        """Take in what another observer saw of other sequences."""
        self._of_loss &= other._of_loss
        self._sequences += other._sequences
        self._batches += other._batches
        for name, theirs in other._tensors.items():
            mine = self._tensors[name]
            mine.reached |= theirs.reached
            mine.reason = "" if mine.reached else mine.reason or theirs.reason
            if not mine.entries:
                mine.entries, mine.of_weights, mine.sizes = theirs.entries, theirs.of_weights, theirs.sizes
            if theirs.total is not None:
                mine.total = theirs.total if mine.total is None else mine.total + theirs.total.to(mine.total.device)
            for index, squares in enumerate(theirs.squares):
                if index < len(mine.squares):
                    mine.squares[index] = [
                        a + b.to(a.device) for a, b in zip(mine.squares[index], squares, strict=True)
                    ]
                else:
                    mine.squares.append(squares)

    # ------------------------------------------------------------ rows

    def _mean(self, squares: Tensor) -> Tensor:
        """Squared norms of the mean loss; of projections the mean over sequences of the squared norms."""
        return squares / (self._sequences**2 if self._of_loss else self._sequences)

    def _role_rows(self, by_role: Mapping[Place, list[_Part]]) -> list[Row]:
        rows = []
        elasticities: dict[Place, Tensor] = {}
        sizes: dict[Place, tuple[Tensor, int]] = {}
        for place, parts in by_role.items():
            of_weight = torch.stack([part.of_weight.cpu().square() for part in parts]).sum()
            of_gradient = self._mean(torch.stack([part.squares for part in parts]).sum(0))
            elasticities[place] = of_weight * of_gradient
            sizes[place] = of_gradient, sum(part.entries for part in parts)
            away = [part.held.reason for part in parts if part.held.reason]
            part_of_it = f"{len(away)} of its {len(parts)} tensors: " if len(away) < len(parts) else ""
            note = f"{part_of_it}{away[0]}" if away else ""
            if any(len({p.layer for p, _ in part.held.weights}) > 1 for part in parts):
                note = note or "the parameter serves several layers: its gradient is their sum"
            rows.append(self._row(place, "elasticity", torch.sqrt, elasticities[place], reason=note))
        for place in [place for place in by_role if place.part.rsplit(".", 1)[-1] == "q"]:
            call = place.part.rpartition(".")[0]
            four = [place._replace(part=f"{call}.{role}" if call else role) for role in _ROLES]
            if all(one in by_role for one in four):
                where = place._replace(part=call or "self")
                squares = [elasticities[one] for one in four]
                rows.append(self._row(where, "elasticity_ratio", _ratio, *squares, undefined=_NO_RATIO))
                ratio = _ratio_of_sizes([sizes[one][1] for one in four])
                squares = [sizes[one][0] for one in four]
                rows.append(self._row(where, "query_key_to_value_output", ratio, *squares, undefined=_NO_RATIO))
        return rows

    def _spread_row(self, stack: str, depth: int, gathered: Mapping[str, Tensor | None]) -> Row:
        place = Place(stack, depth, "gradient", "all")
        inside = [
            (held, found)
            for name, held in self._tensors.items()
            if held.place.stack == stack and held.place.layer > 0 and (found := gathered[name]) is not None
            if held.entries and not held.reason
        ]
        if not inside:
            return self._row(place, "gradient_heterogeneity", None, reason=_UNTOUCHED)
        entries = torch.tensor([held.entries for held, _ in inside])

        def gini(*squares: Tensor) -> Tensor:
            return metrics.gradient_heterogeneity(torch.cat(squares).sqrt(), entries)[None]

        return self._row(place, "gradient_heterogeneity", gini, *(self._mean(found[:, 0]) for _, found in inside))

    def _row(
        self,
        place: Place,
        metric: str,
        function: Callable[..., Tensor] | None,
        *squares: Tensor,
        reason: str = "",
        undefined: str = _UNTOUCHED,
    ) -> Row:
        value = stderr = None
        if function is not None:
            value, stderr, _ = estimate(function, *([S[:, None]] for S in squares))[0]
        if value is None:
            reason = reason or undefined
        n = self._sequences if value is not None else 0
        return Row(*place, metric, value, stderr=stderr, n=n, exact=self._of_loss, note=reason)


class _Part(NamedTuple):
    """What one parameter holds of a role."""

    held: _Tensor
    of_weight: Tensor
    entries: int
    squares: Tensor  # of each backward


def _ratio(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    return metrics.elasticity_ratio(q.sqrt(), k.sqrt(), v.sqrt(), o.sqrt())


def _ratio_of_sizes(entries: Sequence[int]) -> Callable[..., Tensor]:
    return lambda *squares: from_squares(squares, entries)


def _squares(gradient: Tensor, held: _Tensor) -> list[Tensor]:
    norms = _norms(gradient, held)
    return [norm.square() for norm in norms]


def _norms(tensor: Tensor, held: _Tensor) -> list[Tensor]:
    """Of the whole tensor, then of what of it plays each role; a role that is all of it costs nothing."""
    whole = metrics.gradient_norm(tensor)
    parts = [part_of(tensor, weight) for _, weight in held.weights]
    return [whole, *(whole if part.numel() == tensor.numel() else metrics.gradient_norm(part) for part in parts)]


def _gathered(held: _Tensor) -> Tensor | None:
    """(backwards, 1 + roles), or None where there is no gradient."""
    if held.total is not None:
        return torch.stack([one.cpu() for one in _squares(held.total, held)])[None]
    if not held.squares:
        return None
    return torch.stack([torch.stack([one.cpu() for one in squares]) for squares in held.squares])


def _tensors_of(model: nn.Module, anatomy: Anatomy) -> tuple[dict[str, _Tensor], dict[Place, str]]:
    """Every parameter with its place and its roles, and the roles that no parameter is known for."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {
        name.replace("_orig_mod.", ""): first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    tensors = {name: _Tensor(_place_of(name.replace("_orig_mod.", ""), anatomy), []) for name in first.values()}
    unknown: dict[Place, str] = {}
    for stack in anatomy.stacks:
        outer = [(0, stack.embed), (len(stack.paths), stack.unembed)]
        inner = [(layer, weight) for layer, weights in enumerate(stack.weights, 1) for weight in weights]
        for layer, weight in (*outer, *inner):
            if weight is None:
                continue
            place = Place(stack.name, layer, "gradient", weight.part)
            reason = unreadable(model, weight)
            if not reason and weight.parameter not in names:
                reason = f"{weight.parameter!r} is made of other parameters"
            if not reason and not _fits(model.get_parameter(names[weight.parameter]), weight):
                reason = f"its place in {weight.parameter!r} could not be told"
            if reason:
                unknown.setdefault(place, reason)
            else:
                tensors[names[weight.parameter]].weights.append((place, weight))
    return tensors, unknown


def _fits(parameter: Tensor, weight: Weight) -> bool:
    try:
        return part_of(torch.empty(parameter.shape, device="meta"), weight).numel() > 0
    except (IndexError, RuntimeError):
        return False


def _place_of(name: str, anatomy: Anatomy) -> Place:
    """The first block call that the parameter lies in; layer 0 of the nearest stack where it lies in none."""
    for stack in anatomy.stacks:
        inside = [layer for layer, path in enumerate(stack.paths, 1) if name.startswith(f"{path}.")]
        if inside:
            return Place(stack.name, inside[0], "gradient", name)
    nearest = max(anatomy.stacks, key=lambda stack: _shared(name, stack), default=None)
    return Place(nearest.name if nearest is not None else "", 0, "gradient", name)


def _shared(name: str, stack: Stack) -> int:
    """How many modules around a parameter are also around the stack's blocks."""
    pairs = zip(name.split("."), stack.paths[0].split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
