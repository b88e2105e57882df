"""What a block does to its stream: norms and where they stand, factors of skips and branches, its nonlinearity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.capture.additions import Addition
from fullrank.capture.lineage import Ref
from fullrank.capture.replay import between
from fullrank.capture.weights import Role, indices, per_head
from fullrank.measure.block_parts import Parts, Untold
from fullrank.measure.token_map import TokenMap, nonlinearity

__all__ = ["BlockForm", "MLPForm", "block_form", "mlp_form", "rms_of_biases"]

_NORMED = ("layernorm", "rmsnorm", "batchnorm")


@dataclass(frozen=True)
class BlockForm:
    """The sums of one block.

    Attributes:
        norm: `layernorm`, `rmsnorm`, `batchnorm` or `none`.
        placement: `pre`, `post`, `peri`, `res-post` or `none`.
        parallel: whether attention and MLP read one state.
        attention_branch: multiplies what attention adds.
        mlp_branch: multiplies what the MLP adds.
        attention_skip: multiplies the stream past attention.
        mlp_skip: multiplies the stream past the MLP.
    """

    norm: str
    placement: str
    parallel: bool
    attention_branch: float
    mlp_branch: float
    attention_skip: float
    mlp_skip: float


def block_form(parts: Parts) -> BlockForm:
    """Read the sums of a block.

    Args:
        parts: of the block.

    Returns:
        Its form.

    Raises:
        Untold: where it has another one.
    """
    sums = parts.sums
    last: dict[str, Role] = {"attention": "o", "mlp": "down"}
    first: dict[str, Role] = {"attention": "v", "mlp": "up"}
    if "down" not in parts.weights:
        del last["mlp"], first["mlp"]
    owner = {name: parts.taken_up(role) for name, role in last.items()}
    if set(owner.values()) != set(range(len(sums.additions))):
        raise Untold("its blocks add more to the stream than what attention and MLP write")
    outs = tuple(parts.out(role) for role in last.values())
    wrote = {
        name: _checked(parts, parts.out(role), sums.additions[owner[name]].branch, outs) for name, role in last.items()
    }
    places = {name: parts.place_read(parts.products[role].reads) for name, role in first.items()}
    read = {name: _checked(parts, places[name][1], parts.products[role].reads) for name, role in first.items()}
    for role in ("q", "k", "gate"):
        if role in parts.products:
            reads = parts.products[role].reads
            name = "mlp" if role == "gate" else "attention"
            index, place = parts.place_read(reads)
            if index != places[name][0] or _checked(parts, place, reads).kind != read[name].kind:
                raise Untold("queries, keys and values, or gate and up, do not read the same state of the stream")
    states = [_checked(parts, one.start, one.state) for one in sums.additions]
    states.append(_checked(parts, sums.additions[-1].total, sums.output))
    parallel = "mlp" in places and places["mlp"][0] == places["attention"][0]
    if (
        places["attention"][0] != 0
        or owner["attention"] != 0
        or ("mlp" in places and not parallel and len(states) != 3)
    ):
        raise Untold("in its blocks the MLP does not follow attention, nor stand beside it")
    skips = {}
    for name, role in first.items():  # a state that is normed, read, and multiplied before it is added to
        index, place = places[name]
        one, reads = sums.additions[index], parts.products[role].reads
        if place == one.start and read[name].kind in _NORMED and states[index].kind in _NORMED:
            read[name], skips[name] = _after_norm(parts, one, reads) or (read[name], 1.0)
    norm, placement = _placement(states, list(read.values()), list(wrote.values()))
    branches = {name: _alpha(parts, owner[name]) * wrote[name].gain for name in wrote}
    skips |= dict.fromkeys(wrote.keys() - skips.keys(), 1.0)
    for index, state in enumerate(states):
        if state.kind != "scale":
            continue
        here = [name for name in wrote if owner[name] == index]
        before = [name for name in wrote if owner[name] == index - 1]
        own = here and (not before or sums.additions[index].start in [places[name][1] for name in here])
        for name in here if own else before:
            skips[name] *= state.gain
            branches[name] *= 1.0 if own else state.gain
    return BlockForm(
        norm,
        placement,
        parallel,
        branches["attention"],
        branches.get("mlp", 1.0),
        skips["attention"],
        skips.get("mlp", 1.0),
    )


def _checked(parts: Parts, start: Ref, end: Ref, still: tuple[Ref, ...] = ()) -> TokenMap:
    if parts.normalises_samples(start, end):
        return TokenMap("batchnorm", 1.0, 1, 1.0, 1.0)
    found = parts.map(start, end, zeros=still)
    if found.kind == "other":
        raise Untold("between weights and stream its blocks compute what is neither a norm nor a factor")
    return found


def _after_norm(parts: Parts, one: Addition, reads: Ref) -> tuple[TokenMap, float] | None:
    """Where one norm makes both what is added to and what is read: what becomes of it on the way to each."""
    ways = between({one.start: None}, reads)
    shared = [node for node in between({one.start: None}, one.state) if any(node is other for other in ways)]
    if not shared:
        return None
    read, state = (_checked(parts, shared[-1].out, end) for end in (reads, one.state))
    return (read, state.gain) if read.kind == state.kind == "scale" else None


def _alpha(parts: Parts, index: int) -> float:
    return float(parts.sums.additions[index].total.node.kwargs.get("alpha", 1.0))


def _placement(states: list[TokenMap], read: list[TokenMap], wrote: list[TokenMap]) -> tuple[str, str]:
    """Where norms stand: of states, of what branches read, of what they write."""
    kinds = {one.kind for one in (*states, *read, *wrote)} & set(_NORMED)
    if len(kinds) > 1:
        raise Untold(f"its norms are of several kinds ({', '.join(sorted(kinds))})")
    normed = [sum(one.kind in _NORMED for one in some) for some in (states, read, wrote)]
    sums, branches = len(states) - 1, len(read)
    if normed == [0, 0, 0]:
        return "none", "none"
    kind = kinds.pop()
    for placement, wanted in {
        "pre": [0, branches, 0],
        "post": [sums, 0, 0],
        "peri": [0, branches, branches],
        "res-post": [0, 0, branches],
    }.items():
        if normed == wanted:
            return kind, placement
    raise Untold("its norms stand in places of their own")


@dataclass(frozen=True)
class MLPForm:
    """What an MLP does between its weights.

    Attributes:
        activation: a name of `token_map.NONLINEARITIES`.
        gated: whether it has a gate.
        factor: multiplies what the last weight is given.
    """

    activation: str
    gated: bool
    factor: float


def mlp_form(parts: Parts) -> MLPForm:
    """Read the nonlinearity of an MLP off what it makes of random numbers.

    Args:
        parts: of a block with an MLP.

    Returns:
        Its form.

    Raises:
        Untold: for a function that an architecture has no name for.
    """
    through: Role = "gate" if "gate" in parts.products else "up"
    start, end = parts.out(through), parts.products["down"].reads
    axis = parts.products[through].features[-1]
    mine = parts.features(through)
    size = [*start.shape]
    size[axis] = len(mine)

    def run(z: Tensor) -> Tensor:
        given = {}
        if through == "gate":
            other = parts.out("up")
            given[other] = torch.ones(other.shape, dtype=parts.dtype, device=parts.device)
        full = given.get(start, torch.ones(start.shape, dtype=parts.dtype, device=parts.device)).clone()
        full.index_copy_(axis, mine.to(parts.device), z.to(parts.device))
        return parts.run(end, given | {start: full}).cpu()

    name, factor = nonlinearity(run, torch.Size(size), dtype=parts.dtype)
    if not name:
        raise Untold("what its MLP computes between its weights is no identity, relu, gelu, silu or tanh")
    return MLPForm(name, through == "gate", factor)


def rms_of_biases(parts: Parts) -> tuple[float, float, float]:
    """Mean squares of the entries of the biases of attention's branch, of the MLP's and of its first weight.

    That of attention is W_O b_V + b_O: rows of a map sum to one.

    Args:
        parts: of a block.

    Returns:
        Three mean squares.

    Raises:
        Untold: where the values' bias cannot be sent through W_O.
    """
    added, values = parts.bias("o"), parts.bias("v")
    if bool(values.any()):
        columns = per_head(parts.model, parts.weights["o"])
        rows = [torch.tensor(indices(head)) for head in parts.weights["v"].heads]
        if len(rows) != len(columns):
            raise Untold("which entries of the values' bias belong to which head is not known")
        if max(int(head.max()) for head in rows) >= len(values):
            raise Untold("the values' bias could not be followed")
        for W, which in zip(columns, rows, strict=True):
            added = added + W.double().cpu() @ values[which]
    if "down" not in parts.products:
        return _square(added), 0.0, 0.0
    return _square(added), _square(parts.bias("down")), _square(parts.bias("up")[parts.features("up")])


def _square(values: Tensor) -> float:
    return float(values.square().mean()) if values.numel() else math.nan
