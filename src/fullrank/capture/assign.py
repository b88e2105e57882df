"""Roles of all weights of a model, from the lineage of one forward."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fullrank.capture.experts import stacked
from fullrank.capture.inputs import inputs_of
from fullrank.capture.lineage import Lineage, Node, Ref
from fullrank.capture.mlp import mlp_roles
from fullrank.capture.places import place_of
from fullrank.capture.products import Product, product_of
from fullrank.capture.roles import attention_roles, weight_of
from fullrank.capture.tensors import first_state, stream_input, tensors_in
from fullrank.capture.upstream import Region
from fullrank.capture.visits import Visit
from fullrank.capture.ways import IDENTITY, MOVES
from fullrank.capture.weights import Weight

__all__ = ["Call", "Spans", "block_roles", "model_roles"]


@dataclass(frozen=True, eq=False)
class Call:
    """An attention call of a block: its part, its node in the lineage, its query heads."""

    part: str
    node: Node | None
    heads: int


@dataclass(eq=False)
class Span:
    """Where in the lineage one module call lies."""

    first: int
    last: int = 0
    stream: Ref | None = None
    given: list[Ref] = field(default_factory=list)
    places: dict[int | str, Ref] = field(default_factory=dict)
    output: Ref | None = None


class Spans:
    """Where in the lineage the module calls of a forward lie.

    Args:
        lineage: is written at the same time.
    """

    def __init__(self, lineage: Lineage) -> None:
        self.lineage = lineage
        self._of: dict[int, tuple[object, Span]] = {}

    def enter(self, visit: object, args: tuple[Any, ...], kwargs: dict[str, Any], *, member: bool) -> None:
        """A module is called; one that may be a block is called with states, whatever they were made from."""
        stream = stream_input(args, kwargs)
        if member and isinstance(stream, Tensor):
            self.lineage.enter(stream)
        given = [self.lineage.ref(one) for one in (*tensors_in(args), *tensors_in(kwargs)) if one.is_floating_point()]
        span = Span(len(self.lineage.nodes), given=given)
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, one in places:
            if isinstance(one, Tensor) and one.is_floating_point():
                span.places[place] = self.lineage.ref(one)
        if isinstance(stream, Tensor):
            span.stream = self.lineage.ref(stream)
        self._of[id(visit)] = (visit, span)

    def leave(self, visit: object, output: Any) -> None:
        """It returns."""
        span = self._of[id(visit)][1]
        span.last = len(self.lineage.nodes)
        state = first_state(output)
        if state is not None:
            span.output = self.lineage.ref(state)
            span.last = max(span.last, span.output.node.order + 1)

    def of(self, visit: Visit) -> Span | None:
        """Where a module call lies; its stream is where the calls before and after it say that it is."""
        found = self._of.get(id(visit))
        if found is None:
            return None
        span = found[1]
        return span if visit.at not in span.places else replace(span, stream=span.places[visit.at])


def block_roles(
    model: nn.Module, path: str, span: Span | None, calls: Sequence[Call], nodes: list[Node]
) -> list[Weight]:
    """The weights of one block call.

    Args:
        model: the model.
        path: name of the block.
        span: where its call lies.
        calls: its attention calls.
        nodes: the lineage.

    Returns:
        Four weights of every attention call, then those of its MLPs.
    """
    if span is None or span.stream is None or span.output is None:
        return []
    region = Region(nodes, span.first, span.last, span.given)
    states = region.states(span.stream)
    found: list[Weight] = []
    attended: set[int] = set()
    for call in calls:
        if call.node is None:
            continue
        inputs = inputs_of(call.node, region, states)
        for weight in attention_roles(call.node, inputs, call.part, call.heads, region, states):
            found.extend(stacked(model, [weight]) if weight.stacked else [weight])
        attended |= {product.node.order for product in region.down(call.node, states)}
        for ref in inputs.refs.values():
            if ref is not None:
                attended |= {hit.node.order for hit in region.up(ref, states)[0]}
    found.extend(mlp_roles(model, path, region, span.output, attended, states))
    return found


def model_roles(
    first: Span | None, last: Span | None, nodes: list[Node], others: Sequence[Span | None] = ()
) -> list[Weight]:
    """The embedding before the first block and the unembedding after the last.

    Args:
        first: where the first block's call lies.
        last: where the last one's lies.
        nodes: the lineage.
        others: where the last blocks of other stacks lie: what comes after one of them is that stack's.

    Returns:
        `embed`, the largest table that is looked up (for images, the largest product) on the way to the first block;
        `unembed`, the first product after the last block with one output for each entry of that table. Each is left
        out where there is none.
    """
    found: list[Weight] = []
    if first is None or first.stream is None:
        return found
    table = _table(first.stream)
    if table is not None:
        found.append(Weight("embed", parameter=table.node.tensor))
    else:
        hits, _ = Region(nodes, 0, first.first, []).up(first.stream)
        if hits:
            largest = max((hit.product for hit in hits), key=_size)
            found.append(weight_of("embed", "", largest, [], None, []))
    if last is None or last.output is None or table is None:
        return found
    closed = {other.output.node.order for other in others if other is not None and other.output is not None}
    after = _after(last.output, nodes, table.shape[0], closed)
    if after is not None:
        found.append(weight_of("unembed", "", after, [], None, []))
    return found


def _size(product: Product) -> int:
    return 0 if product.weight is None else product.weight.shape.numel()


def _table(stream: Ref) -> Ref | None:
    # the table that the very tokens are looked up in comes before one for numbers computed from them, such as positions
    tables: list[tuple[bool, int, Ref]] = []
    waiting, seen = [stream.node], set()
    while waiting:
        node = waiting.pop()
        if node.order in seen:
            continue
        seen.add(node.order)
        if node.name == "embedding" and len(node.parents) > 1:
            for ref in node.parents:
                indices = [parent for parent in node.parents if parent is not ref and parent.node.data]
                if ref.node.name == "parameter" and indices:
                    tables.append((_as_given(indices[0]), ref.shape[0], ref))
            continue
        waiting.extend(parent.node for parent in node.parents if parent.node.floating)
    return max(tables, key=lambda entry: entry[:2])[2] if tables else None


def _as_given(ref: Ref) -> bool:
    while ref.node.name in IDENTITY or ref.node.name in MOVES or ref.node.name == "pad":
        ref = ref.node.parents[0]
    return ref.node.name == "given"


def _after(output: Ref, nodes: list[Node], entries: int, closed: Set[int]) -> Product | None:
    reached = {output.node.order}
    for node in nodes[output.node.order + 1 :]:
        if node.order in closed:
            continue
        if not any(parent.node.order in reached and parent.node.floating for parent in node.parents):
            continue
        reached.add(node.order)
        product = product_of(node)
        if product is not None and product.features and node.shapes[0][product.features[-1]] == entries:
            return product if not place_of(product).reason else None
    return None
