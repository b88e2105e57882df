"""What an attention kernel was given: queries, keys and values, also where the model writes its attention out.

Such attention is entered through its logits: of the products that make them, the one whose factors both come from the
stream is the content term (position terms have a factor that does not).
"""

from __future__ import annotations

from fullrank.capture.lineage import Node, Ref
from fullrank.capture.products import factors_of, is_product
from fullrank.capture.softmax import spelt_out
from fullrank.capture.upstream import Region

__all__ = ["Inputs", "inputs_of", "labels_of", "softmax_above"]


class Inputs:
    """What an attention kernel was given, with the axis of each that holds its features.

    Args:
        query: queries, or None where they could not be told.
        key: keys.
        value: values.
        axes: feature axis of each of them.
    """

    def __init__(self, query: Ref | None, key: Ref | None, value: Ref | None, axes: tuple[int, int, int]) -> None:
        self.refs = {"q": query, "k": key, "v": value}
        self.axes = dict(zip("qkv", axes, strict=True))


def inputs_of(call: Node, region: Region, states: set[int]) -> Inputs:
    """Queries, keys and values of an attention call.

    Args:
        call: the kernel, or the product of a made map with values.
        region: the block around it.
        states: calls that hand the stream on.

    Returns:
        The three, as far as they are known.
    """
    if not is_product(call):
        named = [call.kwargs.get(name) for name in ("query", "key", "value")]
        placed = iter([value for value in call.args if isinstance(value, Ref) and value.node.floating])
        given = [value if isinstance(value, Ref) else next(placed, None) for value in named]
        return Inputs(given[0], given[1], given[2], (-1, -1, -1))
    factors = factors_of(call)
    if factors is None:
        return Inputs(None, None, None, (-1, -1, -1))
    weights, value, axis = _map_and_values(call, factors)
    found = _logits(weights, region, states) if weights is not None else None
    if found is None:
        return Inputs(None, None, value, (-1, -1, axis))
    query, key, query_axis, key_axis = found
    return Inputs(query, key, value, (query_axis, key_axis, axis))


def _map_and_values(call: Node, factors: tuple[Ref, Ref]) -> tuple[Ref | None, Ref, int]:
    for mine, other in (factors, factors[::-1]):
        if softmax_above(mine) is None:
            continue
        if call.name == "einsum":
            labels = labels_of(call)
            if labels is None:
                return mine, other, -1
            left, right = (labels[0], labels[1]) if mine is factors[0] else (labels[1], labels[0])
            width = [label for label in right if label in labels[2] and label not in left]
            return mine, other, right.index(width[0]) - len(right) if width else -1
        return mine, other, -1 if mine is factors[0] else -2
    return None, factors[1], -1


def labels_of(call: Node) -> tuple[str, str, str] | None:
    """Labels of the two factors of an einsum and of its result; None where it has others or does not say them."""
    equation, factors = call.args[0], factors_of(call)
    if not isinstance(equation, str) or "->" not in equation or factors is None:
        return None
    inputs, out = spelt_out(equation.replace(" ", ""), factors)
    left, right = inputs.split(",")
    return left, right, out


def softmax_above(ref: Ref) -> Node | None:
    """The softmax that a map was made by, through casts, dropout and views."""
    waiting, seen = [ref.node], set()
    while waiting:
        node = waiting.pop()
        if "softmax" in node.name:
            return node
        if node.order in seen or is_product(node) or node.attention:
            continue
        seen.add(node.order)
        waiting.extend(parent.node for parent in node.parents if parent.node.floating)
    return None


def _logits(weights: Ref, region: Region, states: set[int]) -> tuple[Ref, Ref, int, int] | None:
    """The factors of the content term of the logits: queries and keys, and their feature axes."""
    softmax = softmax_above(weights)
    assert softmax is not None
    products: list[Node] = []
    waiting, seen = [parent.node for parent in softmax.parents if parent.node.floating], set()
    while waiting:
        node = waiting.pop()
        if node.order in seen or not node.data or node.attention:
            continue
        seen.add(node.order)
        if is_product(node) and region.product(node) is None:
            products.append(node)
        elif region.product(node) is None:
            waiting.extend(parent.node for parent in node.parents if parent.node.floating)
    best, most = None, -1
    for node in sorted(products, key=lambda node: node.order):
        factors = factors_of(node)
        if factors is None:
            continue
        # queries come from the stream; so do keys, but for cross-attention
        score = 2 * region.depends(factors[0].node, states) + region.depends(factors[1].node, states)
        if score > most:
            best, most = node, score
    if best is None:
        return None
    factors = factors_of(best)
    assert factors is not None
    if best.name != "einsum":
        return factors[0], factors[1], -1, -2
    labels = labels_of(best)
    if labels is None:
        return factors[0], factors[1], -1, -1
    shared = [label for label in labels[0] if label in labels[1] and label not in labels[2]]
    if len(shared) != 1:
        return None
    return factors[0], factors[1], labels[0].index(shared[0]), labels[1].index(shared[0])
