"""What a norm from one tensor of a block to another would be: read by a branch, of what one adds, or of a sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fullrank.capture.additions import Sums, gate_of
from fullrank.capture.lineage import Node, Ref
from fullrank.capture.replay import between
from fullrank.capture.upstream import Region
from fullrank.edit.branches import Branch

__all__ = ["BlockRoles", "Role"]

Role = Literal["read", "sum", "branch", "final"]


class BlockRoles:
    """The sums of one block call, and what the branches are made from.

    Args:
        region: the calls of the block.
        sums: its additions to the stream.
        branches: what is added.
        leaves: by name of the branch what its module returned.
    """

    def __init__(self, region: Region, sums: Sums, branches: list[Branch], leaves: dict[str, Ref]) -> None:
        self.region, self.sums = region, sums
        self._branches, self._leaves = branches, leaves
        cut = {sums.stream.node.order, *(one.total.node.order for one in sums.additions)}
        self._made_from = {name: self._upstream(leaf, cut) for name, leaf in leaves.items()}
        self._plain = [self._upstream(one.branch, cut, plain=True) for one in sums.additions]
        ends = [*(one.state for one in sums.additions), sums.output]
        starts = [*(one.start for one in sums.additions), sums.additions[-1].total]
        self._states = list(zip(starts, ends, strict=True))
        self._chains = [
            {node.order for node in between({start: None}, end)} if start != end else set()
            for start, end in self._states
        ]

    def roles(self, start: Ref, end: Ref) -> list[tuple[Role, str]]:
        """What a norm from one tensor to the other would be."""
        order = end.node.order
        for index, chain in enumerate(self._chains[1:]):
            if order in chain:
                return [("sum", name) for name in self._of(index)]
        for index, plain in enumerate(self._plain):
            if order in plain and start.node.order not in self.sums.states:
                mine = [n for n in self._of(index) if n in self._leaves and self._on_the_way(order, n)]
                return [("branch", name) for name in mine or self._of(index)]
        if start.node.order in self.sums.states:
            return [("read", name) for name, nodes in self._made_from.items() if order in nodes]
        return []

    def bare(self) -> Iterator[tuple[tuple[Role, str], Ref, Ref]]:
        """Pairs of tensors between which a norm may be written out in the block: states, and what branches read."""
        for index, (start, end) in enumerate(self._states[1:]):
            if start != end:
                for name in self._of(index):
                    yield ("sum", name), start, end
        places = {place.node.order: place for place in self.sums.places}
        for name, nodes in self._made_from.items():
            for node in self.region.calls:
                product = self.region.product(node) if node.order in nodes else None
                if product is None or product.reads.node.order not in self.sums.states:
                    continue
                gate = gate_of(product.reads, self.sums.states, lambda each: each.order in places)
                if gate is not None and gate != product.reads:
                    yield ("read", name), gate, product.reads

    def _of(self, addition: int) -> list[str]:
        return [branch.name for branch in self._branches if branch.addition == addition]

    def _on_the_way(self, order: int, name: str) -> bool:
        return order in self._made_from[name] or order == self._leaves[name].node.order

    def _upstream(self, start: Ref, cut: set[int], *, plain: bool = False) -> set[int]:
        """Orders of the calls that a tensor was made from, since the last sum; plain: since the last product."""
        found: set[int] = set()
        waiting: list[Node] = [start.node]
        while waiting:
            node = waiting.pop()
            if node.order in found or node.order in cut or not node.data:
                continue
            if plain and (node.attention or self.region.product(node) is not None):
                continue
            found.add(node.order)
            waiting.extend(parent.node for parent in node.parents if not self.region.ends(parent))
        return found
