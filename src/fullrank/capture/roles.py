"""Which weights are W_Q, W_K, W_V and W_O of an attention call, by the lineage of what its kernel was given and made.

No name is asked. From the kernel's q, k and v upstream to the first product with a weight, from its output downstream
to the first; rotary embeddings, norms, scales and casts on the way are walked through. Where one product makes several
of them (a fused layout), its output features are numbered and the numbers sent the way that the features went.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fullrank.capture.inputs import Inputs, labels_of, softmax_above
from fullrank.capture.lineage import Node, Ref
from fullrank.capture.places import place_of
from fullrank.capture.products import Product, factors_of
from fullrank.capture.upstream import Region, carried, origin
from fullrank.capture.ways import Way, compact
from fullrank.capture.weights import Role, Runs, Weight, runs

__all__ = ["attention_roles", "beside", "weight_of"]

NOTHING = "no product with a weight was seen between the stream and it"
UNSEEN = "a function that was not seen lies before it"


def attention_roles(
    call: Node, inputs: Inputs, part: str, heads: int, region: Region, states: set[int]
) -> list[Weight]:
    """The weights of one attention call: q, k, v, o.

    Args:
        call: the kernel call.
        inputs: what it was given.
        part: `self`, `cross`, …
        heads: how many query heads it has.
        region: the block around it.
        states: calls that hand the stream on.

    Returns:
        Four weights; one that is not known says why.
    """
    found: list[Weight] = []
    wanted: tuple[Role, ...] = ("q", "k", "v")
    for role in wanted:
        ref = inputs.refs[role]
        if ref is None:
            found.append(Weight(role, part, reason="what the kernel was given could not be told"))
        else:
            found.append(_upstream(role, part, ref, inputs.axes[role], heads, region, states))
    found = _told_apart(found)
    return [*found, _output(call, part, heads, region, states)]


def _upstream(role: Role, part: str, ref: Ref, axis: int, heads: int, region: Region, states: set[int]) -> Weight:
    hits, opaque = region.up(ref, states)
    if not hits:
        return Weight(role, part, reason=UNSEEN if opaque else NOTHING)
    products = list({hit.node.order: hit.product for hit in hits}.values())
    numbers = {p.node.order: Way(Ref(p.node, 0), p.features).to(ref) for p in products}
    main, others = beside(products, region, {order: _count(found) for order, found in numbers.items()}, states)
    weight = weight_of(role, part, main, others, *_features(numbers[main.node.order], axis, heads))
    return weight if not region.up(main.reads, states)[0] else replace(weight, direct=False)


def _count(numbers: Tensor | None) -> int:
    return 0 if numbers is None else int(compact(numbers).unique().numel())


def beside(
    products: list[Product], region: Region, counts: dict[int, int], states: set[int]
) -> tuple[Product, list[Product]]:
    """Of several products that make one tensor the main one, and the others.

    The one that gives most features; of those that give as many, the one that reads the stream rather than another
    product's result (a low-rank adapter reads its own first factor); then the first.

    Args:
        products: the candidates.
        region: the block.
        counts: how many features each gives, by order.
        states: calls that hand the stream on.

    Returns:
        The main one, and the others with the first factors of adapters.
    """
    inner = {p.node.order: [hit.product for hit in region.up(p.reads, states)[0]] for p in products}
    ordered = sorted(products, key=lambda p: (-counts.get(p.node.order, 0), bool(inner[p.node.order]), p.node.order))
    main = ordered[0]
    others = []
    for product in ordered[1:]:
        firsts = [p for p in inner[product.node.order] if origin(p.reads) == origin(main.reads)]
        others.extend([product, *firsts])
    return main, others


def _features(numbers: Tensor | None, axis: int, heads: int) -> tuple[list[int] | None, list[list[int]]]:
    """Feature numbers that a tensor holds, and those of each head."""
    if numbers is None:
        return None, []
    numbers = compact(numbers.movedim(axis, -1), keep_last=True)
    rows = numbers.reshape(-1, numbers.shape[-1])
    each: list[list[int]] = []
    for row in rows.tolist():
        numbers_of_row = [int(number) for number in row if number >= 0]
        if not each or numbers_of_row != each[-1] or len(rows) == heads:
            each.append(numbers_of_row)
    if len(each) != heads:
        distinct = list(dict.fromkeys(map(tuple, each)))
        # grouped queries: the kernel lets as many query heads in a row share each key head
        each = (
            [list(distinct[head * len(distinct) // heads]) for head in range(heads)]
            if _grouped(distinct, heads)
            else []
        )
    every = sorted(
        {number for row in (each or [[int(x) for x in rows.flatten().tolist()]]) for number in row if number >= 0}
    )
    return every, [row for row in each if row]


def _grouped(distinct: list[tuple[int, ...]], heads: int) -> bool:
    return bool(distinct) and heads % len(distinct) == 0


def _output(call: Node, part: str, heads: int, region: Region, states: set[int]) -> Weight:
    found = region.down(call, states)
    if not found:
        return Weight("o", part, reason="no product with a weight reads what the kernel returned")
    main, *others = sorted(found, key=lambda p: (-p.node.shapes[0][p.features[-1]], p.node.order))
    shape = call.shapes[0]
    axes = _output_axes(call, shape, heads)
    numbers = Way(call.out, axes).to(main.reads) if axes is not None else None
    columns: list[list[int]] = []
    if numbers is not None and axes is not None:
        width = shape[axes[-1]]
        order = [axis % numbers.ndim for axis in main.contracted]
        rest = [axis for axis in range(numbers.ndim) if axis not in order]
        flat = numbers.permute(*rest, *order).reshape(-1, torch.Size(numbers.shape[axis] for axis in order).numel())
        columns = [[] for _ in range(heads)]
        for column, number in enumerate(flat[0].tolist()):
            if number >= 0:
                columns[int(number) // width % heads].append(column)
        if any(not head for head in columns):
            columns = []
    weight = weight_of("o", part, main, [*others, *region.read_by(others)], None, [])
    place = place_of(main)
    if not weight.reason and columns:
        weight = replace(weight, heads=tuple(_runs(head, place.columns) for head in columns))
    return weight if carried(call.out, main.reads) else replace(weight, direct=False)


def _output_axes(call: Node, shape: torch.Size, heads: int) -> tuple[int, int] | None:
    """Axes of the heads and of their features in what the kernel returned."""
    if heads < 1 or len(shape) < 3:
        return None
    if call.name == "einsum":
        labels = labels_of(call)
        if labels is None:
            return None
        width = [i for i, label in enumerate(labels[2]) if (label in labels[0]) != (label in labels[1])]
        both = [i for i, label in enumerate(labels[2]) if label in labels[0] and label in labels[1]]
        # features belong to the values alone, queries to the map alone: the one that is no query is last of them
        named = [i for i in both if shape[i] == heads]
        right = [i for i in width if labels[2][i] in _value_labels(call, labels)]
        return (named[-1], right[0]) if named and right else None
    if len(shape) == 3:
        return (0, 2) if shape[0] % heads == 0 else None
    return (len(shape) - 3, len(shape) - 1) if shape[-3] == heads else None


def _value_labels(call: Node, labels: tuple[str, str, str]) -> str:
    factors = factors_of(call)
    assert factors is not None
    return labels[1] if softmax_above(factors[0]) is not None else labels[0]


# ---------------------------------------------------------------- describing


def weight_of(
    role: Role, call: str, product: Product, others: list[Product], features: list[int] | None, heads: list[list[int]]
) -> Weight:
    """The weight of a product with its role.

    Args:
        role: what it is.
        call: whom it serves.
        product: the product.
        others: products that add to the same.
        features: which of its outputs play the role; None for all.
        heads: outputs of each head.

    Returns:
        The weight.
    """
    place = place_of(product)
    names = tuple(dict.fromkeys(name for p in others if (name := place_of(p).parameter) and name != place.parameter))
    if place.reason:
        return Weight(role, call, place.parameter, beside=names, reason=place.reason)
    full = torch.Size(product.node.shapes[0][axis] for axis in product.features).numel()
    whole = place.rows is None and (features is None or features == list(range(full)))
    return Weight(
        role,
        call,
        place.parameter,
        rows=None if whole else _runs(features if features is not None else list(range(full)), place.rows),
        columns=None if place.columns is None else runs(place.columns.tolist()),
        out_axes=place.out_axes,
        in_axes=place.in_axes,
        expert=place.expert,
        stacked=place.expert is not None,
        heads=tuple(_runs(head, place.rows) for head in heads),
        beside=names,
    )


def _runs(features: list[int], rows: Tensor | None) -> Runs:
    if rows is None:
        return runs(features)
    known = rows.tolist()
    return runs(known[feature] for feature in features)


def _told_apart(weights: list[Weight]) -> list[Weight]:
    """A product that makes several roles must say which rows make which: else none of them is known."""
    return [_checked(weight, weights) for weight in weights]


def _checked(weight: Weight, weights: list[Weight]) -> Weight:
    followed = weight.heads or weight.rows is not None
    others = [w for w in weights if w is not weight and w.parameter == weight.parameter]
    if followed or not others or weight.reason:
        return weight
    return Weight(
        weight.role,
        weight.call,
        weight.parameter,
        beside=weight.beside,
        reason="which of its rows play this role could not be followed",
    )
