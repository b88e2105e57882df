"""Walks through the lineage of one block: to the first products with a weight, up or down the stream of calls."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from fullrank.capture.lineage import Node, Ref
from fullrank.capture.products import Product, is_product, product_of
from fullrank.capture.residual import ADD
from fullrank.capture.softmax import SOFTMAX
from fullrank.capture.ways import IDENTITY, MOVES

__all__ = ["CARRIED", "Hit", "Region", "carried", "origin"]

_NONLINEAR = frozenset(
    {"relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "celu", "hardswish"}
    | {"hardtanh", "hardsigmoid", "relu6", "mish", "softplus", "erf", "exp", "pow", "__pow__", "square", "softsign"}
    | {"sigmoid_", "tanh_", "logsigmoid", "prelu", "rrelu", "threshold", "softmax", "quick_gelu", "abs", "glu"}
)
_MIXING = frozenset({"cumsum", "cumprod", "logcumsumexp", "conv1d"})
CARRIED = IDENTITY | frozenset({"dropout", "dropout_", "alpha_dropout", "feature_dropout"})
"""What hands a tensor on as it is."""


@dataclass(eq=False)
class Hit:
    """A product that a walk came to.

    Attributes:
        product: the product.
        nonlinear: whether a nonlinearity lies on a way from it.
        mixing: whether tokens are mixed on a way from it.
    """

    product: Product
    nonlinear: bool
    mixing: bool

    @property
    def node(self) -> Node:
        """The call."""
        return self.product.node


class Region:
    """The calls of one block, and where its walks end.

    Args:
        nodes: of the whole forward.
        first: order of the first call of the block.
        last: order after its last call.
        ends: tensors that the block was called with.
    """

    def __init__(self, nodes: list[Node], first: int, last: int, ends: Iterable[Ref]) -> None:
        self.calls = nodes[first:last]
        self._first = first
        self._ends = {(ref.node.order, ref.index) for ref in ends}
        self._products: dict[int, Product | None] = {}

    def product(self, node: Node) -> Product | None:
        """What `product_of` says, asked once."""
        if node.order not in self._products:
            self._products[node.order] = product_of(node)
        return self._products[node.order]

    def ends(self, ref: Ref) -> bool:
        """Whether a walk stops at a tensor: what the block was called with."""
        return (ref.node.order, ref.index) in self._ends

    def up(self, start: Ref, stops: Set[int] = frozenset()) -> tuple[list[Hit], bool]:
        """The first products with a weight that a tensor was made from.

        Args:
            start: the tensor.
            stops: orders of calls that the walk does not go beyond, such as those that hand the stream on.

        Returns:
            The products, each with what lies between, and whether something that could not be seen was met.
        """
        hits: dict[int, Hit] = {}
        seen: set[tuple[int, int, bool, bool]] = set()
        opaque = False
        waiting = [(start, False, False)]
        while waiting:
            ref, nonlinear, mixing = waiting.pop()
            key = (ref.node.order, ref.index, nonlinear, mixing)
            if key in seen or self.ends(ref):
                continue
            seen.add(key)
            node = ref.node
            if node.name in ("parameter", "buffer") or not node.data or node.attention or node.order in stops:
                continue
            if node.name == "given":
                opaque |= node.order >= self._first and node.floating
                continue
            product = self.product(node)
            if product is not None:
                hit = hits.setdefault(node.order, Hit(product, False, False))
                hit.nonlinear |= nonlinear
                hit.mixing |= mixing
                continue
            nonlinear |= node.name in _NONLINEAR
            mixing |= node.name in _MIXING or is_product(node) or _token_by_token(node)
            waiting.extend((parent, nonlinear, mixing) for parent in node.parents if parent.node.floating)
        return [hits[order] for order in sorted(hits)], opaque

    def states(self, stream: Ref) -> set[int]:
        """Orders of the calls that hand the stream on: additions to it, norms and views of it, and no product."""
        found = {stream.node.order}
        for node in self.calls:
            if node.order <= stream.node.order or node.attention or is_product(node) or self.product(node) is not None:
                continue
            if any(parent.node.order in found and parent.node.floating for parent in node.parents):
                found.add(node.order)
        return found

    def down(self, start: Node, states: set[int]) -> list[Product]:
        """The first products with a weight that read what a call returned, up to its addition to the stream."""
        reached = {start.order}
        found = []
        for node in self.calls:
            if node.order <= start.order or not any(p.node.order in reached for p in node.parents):
                continue
            product = self.product(node)
            if product is not None:
                if product.reads.node.order in reached:
                    found.append(product)
                continue
            others = [p for p in node.parents if p.node.order not in reached]
            if node.name in ADD and any(p.node.order in states for p in others):
                continue
            if node.name not in SOFTMAX and node.floating:
                reached.add(node.order)
        return found

    def read_by(self, products: list[Product]) -> list[Product]:
        """The products that read nothing but what some others made, such as the second factors of adapters."""
        orders = {product.node.order for product in products}
        found = []
        for node in self.calls if orders else ():
            product = self.product(node)
            if product is not None and node.order > min(orders):
                hits = {hit.node.order for hit in self.up(product.reads)[0]}
                if hits and hits <= orders:
                    found.append(product)
        return found

    def depends(self, node: Node, on: set[int]) -> bool:
        """Whether a call was made from one of some others, within the block."""
        lowest = min(on, default=0)
        seen: set[int] = set()
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current.order in on:
                return True
            if current.order in seen or current.order < lowest:
                continue
            seen.add(current.order)
            waiting.extend(
                parent.node for parent in current.parents if not self.ends(parent) or parent.node.order in on
            )
        return False


def _token_by_token(node: Node) -> bool:
    """Whether a call writes one place of a tensor, as a loop over tokens does."""
    if node.name != "__setitem__":
        return False
    key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(index, int) and not isinstance(index, bool) for index in key)


def origin(ref: Ref) -> Ref:
    """The tensor before casts, copies and dropout."""
    while ref.node.name in CARRIED and ref.node.parents:
        ref = ref.node.parents[0]
    return ref


def carried(start: Ref, end: Ref) -> bool:
    """Whether nothing but views, casts, copies and dropout lies between two tensors."""
    ref = end
    while ref.node is not start.node:
        if ref.node.name not in CARRIED and ref.node.name not in MOVES:
            return False
        floating = [parent for parent in ref.node.parents if parent.node.floating]
        if len(floating) != 1:
            return False
        ref = floating[0]
    return True
