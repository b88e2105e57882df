"""Tables of embeddings whose sum is the stream at its start, seen by what happens to it when one is disturbed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullrank.capture.wrappers import bare
from fullrank.edit import Edit, replace_weight, together
from fullrank.remedies.patient import Patient
from fullrank.remedies.weighing import check_parameter
from fullrank.remedies.weights.drawing import ratio_to, sized
from fullrank.remedies.weights.stream_states import first_states, mean_squares

__all__ = ["NEAR", "Table", "brought_to_variance", "sums", "tables"]

NEAR = 2.0
"""A mean square of the stream within this factor of what it should be is left, as noise of the batch and padding are
that large."""


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        parameter: its name in the model.
        stacks: those in whose first state it is seen.
        tied: whether it is the weight of the head too.
        frozen: whether it is not trained, as sinusoids are.
        padding: the row of padding, which stays at zero.
    """

    parameter: str
    stacks: tuple[str, ...]
    tied: bool
    frozen: bool
    padding: int | None


def tables(patient: Patient) -> tuple[Table, ...]:
    """Embeddings that stand outside of blocks and are seen in a stack's first state: of words, positions, segments.

    Each is disturbed for one forward. The first states of all stacks are held meanwhile, so that a table that one stack
    reads is not seen in another through the first. Positions that are plain parameters and maps of patches are none.

    Args:
        patient: the model.

    Returns:
        Each tensor once.

    Raises:
        RemedyError: where one is offloaded or stored in a form of its own.
    """
    plain = first_states(patient)
    found = []
    for table in _candidates(patient) if plain else ():
        check_parameter(patient, table.parameter)
        with replace_weight(patient.model, table.parameter, _disturbed):
            moved = first_states(patient, plain)
        stacks = tuple(name for name, X in plain.items() if name in moved and not torch.equal(moved[name], X))
        if stacks:
            found.append(Table(table.parameter, stacks, table.tied, table.frozen, table.padding))
    return tuple(found)


def sums(found: Sequence[Table]) -> list[list[Table]]:
    """Tables that are added up, together with those that share a table with them."""
    groups: list[list[Table]] = []
    for table in found:
        mine = [group for group in groups if any(set(one.stacks) & set(table.stacks) for one in group)]
        groups = [group for group in groups if group not in mine]
        groups.append([one for group in mine for one in group] + [table])
    return groups


def brought_to_variance(patient: Patient, group: Sequence[Table], variance: float, how: str, seed: int) -> Edit:
    """Give the tables of a sum one size, so that the sum has a variance.

    Each entry has the root mean square √(variance/#tables) of the tables that a stack adds up. Where the first state of
    a stack is then further than a factor of 2 from the variance on the batch, all are multiplied by one number that
    brings it there: a model may multiply its stream, or add something else. The number is that of the parabola through
    the mean squares at 0, 1 and 2 times the tables. Behind a norm there is no such number, and none is taken.

    Args:
        patient: the model.
        group: one of `sums`.
        variance: of the first state.
        how: `rescale` or `draw`; what is frozen is rescaled in any case, and rows of padding are 0 where drawn.
        seed: of what is drawn.

    Returns:
        The handle.

    Raises:
        RemedyError: where a table is zero and to be rescaled.
    """
    generator = torch.Generator().manual_seed(seed)
    stacks = list(dict.fromkeys(name for table in group for name in table.stacks))
    count = {name: sum(name in table.stacks for table in group) for name in stacks}
    parameters = dict(bare(patient.model).named_parameters(remove_duplicate=False))
    values = {}
    for table in group:
        std = math.sqrt(variance / max(count[name] for name in table.stacks))
        W = parameters[table.parameter].detach()
        values[table.parameter] = _sized(W, std, table, how, generator)

    def put(factor: float) -> Edit:
        return together(replace_weight(patient.model, name, factor * W) for name, W in values.items())

    def seen(factor: float) -> list[float]:
        with put(factor):
            found = mean_squares(patient, ends=False)
        return [found[name, 0] for name in stacks]

    once = seen(1.0)
    if all(variance / NEAR <= square <= variance * NEAR for square in once):
        return put(1.0)
    roots = [_root(*squares, variance) for squares in zip(seen(0.0), once, seen(2.0), strict=True)]
    known = [root for root in roots if root is not None]
    return put(math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0)


def _root(m0: float, m1: float, m2: float, variance: float) -> float | None:
    """The f > 0 with a·f² + c·f + m₀ = variance, a parabola through the mean squares at 0, 1 and 2."""
    a, near = (m2 - 2 * m1 + m0) / 2, 1e-3 * m1
    c = m1 - m0 - a
    if not math.isfinite(m0 + m1 + m2) or abs(m2 - m1) < near or a < near or m0 >= variance:
        return None
    return (math.sqrt(c * c + 4 * a * (variance - m0)) - c) / (2 * a)


def _sized(W: Tensor, std: float, table: Table, how: str, generator: torch.Generator) -> Tensor:
    rest = W
    if table.padding is not None:
        rest = torch.cat([W[: table.padding], W[table.padding + 1 :]])
    if how == "draw" and not table.frozen:
        drawn = sized(W, std, "draw", generator, table.parameter)
        if table.padding is not None:
            drawn[table.padding] = 0
        return drawn
    if table.frozen and not W.any():
        return W  # it adds nothing and never will
    return W * ratio_to(rest, std, table.parameter)


def _disturbed(W: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    std = float(W.float().square().mean().sqrt()) or 1.0
    return W + (std * torch.randn(W.shape, generator=generator)).to(W)


def _candidates(patient: Patient) -> Iterator[Table]:
    model = bare(patient.model)
    stacks = patient.anatomy.stacks
    blocks = tuple(f"{path}." for stack in stacks for path in stack.paths)
    heads = {stack.unembed.parameter for stack in stacks if stack.unembed is not None}
    names = dict(model.named_parameters(remove_duplicate=False))
    read = {id(names[name]) for name in heads if name in names}
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module._parameters.values()
        if parameter is not None
    }
    of: dict[int, list[tuple[str, nn.Embedding]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not path.startswith(blocks):
            of.setdefault(id(module.weight), []).append((path, module))
    for key, modules in of.items():
        path, first = modules[0]
        padding = next((one.padding_idx for _, one in modules if one.padding_idx is not None), None)
        name = f"{path}.weight" if path else "weight"
        yield Table(name, (), key in read | others, not first.weight.requires_grad, padding)
