"""One block call as its parts: the products of its weights, the sums that take its branches up, its attention call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullrank.capture.additions import Sums, Unfollowed, gate_of, sums_of
from fullrank.capture.inputs import Inputs, inputs_of
from fullrank.capture.lineage import Ref
from fullrank.capture.places import place_of
from fullrank.capture.products import Product
from fullrank.capture.replay import CannotReplay, Replay, between
from fullrank.capture.residual import ADD
from fullrank.capture.survey import Forward
from fullrank.capture.upstream import Region
from fullrank.capture.visits import Attended
from fullrank.capture.weights import Role, Weight, indices, unreadable
from fullrank.measure.token_map import TokenMap, token_map

__all__ = ["Parts", "Untold", "parts_of_block"]

_ATTENTION: tuple[Role, ...] = ("q", "k", "v", "o")


class Untold(Exception):  # noqa: N818 - a reason on its way to a sentence, never shown as an error
    """What an architecture has no words for, or what cannot be told."""


@dataclass(frozen=True, eq=False)
class Parts:
    """One block call.

    Attributes:
        model: the model.
        replay: runs its calls again.
        region: its calls.
        sums: of its stream.
        attended: its attention call.
        inputs: what that was given.
        weights: by role, those of attention and of the MLP; without a gate or an MLP those are missing.
        products: likewise, where they are multiplied with.
    """

    model: nn.Module
    replay: Replay
    region: Region
    sums: Sums
    attended: Attended
    inputs: Inputs
    weights: Mapping[Role, Weight]
    products: Mapping[Role, Product]

    def out(self, role: Role) -> Ref:
        """What a weight makes, its bias included."""
        product = self.products[role].node
        for node in self.region.calls:
            if node.order > product.order and node.name in ADD and any(p.node is product for p in node.parents):
                others = [parent.node for parent in node.parents if parent.node is not product]
                if len(others) == 1 and others[0].stored and not others[0].data:
                    return node.out
        return product.out

    def bias(self, role: Role) -> Tensor:
        """What a weight makes of zeros, (features,), in float64."""
        product = self.products[role]
        zeros = torch.zeros(product.reads.shape, device=self.device, dtype=self.dtype)
        made = self.run(self.out(role), {product.reads: zeros})
        axis = product.features[-1]
        return made.movedim(axis, -1).reshape(-1, made.shape[axis])[0].double().cpu()

    def features(self, role: Role) -> Tensor:
        """Which outputs of its product play a role."""
        product, rows = self.products[role], self.weights[role].rows
        width = product.node.shapes[0][product.features[-1]]
        found = torch.arange(width) if rows is None else torch.tensor(indices(rows))
        if int(found.max()) >= width:
            raise Untold("which outputs of a product play which role could not be followed")
        return found

    def map(self, start: Ref, end: Ref, *, zeros: tuple[Ref, ...] = (), features: Tensor | None = None) -> TokenMap:
        """What becomes of tokens from one tensor to another, while others stand at zero."""
        if start == end:
            return TokenMap("scale", 1.0, 1, 1.0, 1.0)
        still = {ref: torch.zeros(ref.shape, device=self.device, dtype=self.dtype) for ref in zeros if ref != start}

        def run(z: Tensor) -> Tensor:
            return self.run(end, still | {start: z.to(self.device)}).cpu()

        return token_map(run, start.shape, dtype=self.dtype, features=features)

    def normalises_samples(self, start: Ref, end: Ref) -> bool:
        """Whether a batch norm lies between two tensors."""
        return any(node.name == "batch_norm" for node in between({start: None}, end))

    def run(self, end: Ref, given: Mapping[Ref, Tensor]) -> Tensor:
        """As `Replay`, with its reason as one of ours."""
        try:
            return self.replay(end, given)
        except CannotReplay as reason:
            raise Untold(f"what its blocks compute could not be run again: {reason}") from None

    def place_read(self, read: Ref) -> tuple[int, Ref]:
        """Which sum's state a branch reads, and the very tensor, before or after its norms and factors."""
        places = {place.node.order: place for place in self.sums.places}
        gate = gate_of(read, self.sums.states, lambda node: node.order in places)
        if gate is None:
            raise Untold("what its branches read is no function of one state of the stream")
        place = places[gate.node.order]
        for index, one in enumerate(self.sums.additions):
            if place in (one.start, one.state):
                return index, place
        raise Untold("what its branches read is no state of the stream")

    def taken_up(self, role: Role) -> int:
        """Which sum adds what a weight makes."""
        for index, one in enumerate(self.sums.additions):
            out = self.products[role].node.out
            if one.branch == out or between({out: None}, one.branch):
                return index
        raise Untold("what its branches write is not added to the stream")

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def parts_of_block(model: nn.Module, replay: Replay, forward: Forward, stack: int, layer: int) -> Parts:
    """Take one block call apart.

    Args:
        model: the model, in the state that it was followed in.
        replay: of its calls.
        forward: one that was followed.
        stack: index of the stack.
        layer: index of the block call.

    Returns:
        Its parts.

    Raises:
        Untold: where it is no block of one self-attention and at most one MLP.
    """
    found = forward.anatomy.stacks[stack]
    visit = forward.visits[stack][layer]
    span = forward.spans.of(visit)
    where = f"block {found.paths[layer]}"
    if found.calls[layer] != ("self",) or len(visit.attended) != 1:
        calls = ", ".join(found.calls[layer]) or "none"
        raise Untold(f"{where} has the attention calls {calls}, and an architecture one over the tokens themselves")
    attended = visit.attended[0]
    if span is None or span.stream is None or span.output is None or attended.node is None:
        raise Untold(f"the calls of {where} could not be followed")
    region = Region(forward.spans.lineage.nodes, span.first, span.last, span.given)
    try:
        sums = sums_of(region, span.stream, span.output)
    except Unfollowed as reason:
        raise Untold(str(reason)) from None
    weights = _by_role(model, found.weights[layer], where)
    by_name: dict[str, Product] = {}
    for node in region.calls:
        product = region.product(node)
        if product is not None:
            by_name.setdefault(place_of(product).parameter, product)
    products = {role: by_name[weight.parameter] for role, weight in weights.items() if weight.parameter in by_name}
    if products.keys() != weights.keys():
        raise Untold(f"the weights of {where} could not be followed")
    inputs = inputs_of(attended.node, region, set(sums.states))
    return Parts(model, replay, region, sums, attended, inputs, weights, products)


def _by_role(model: nn.Module, weights: tuple[Weight, ...], where: str) -> dict[Role, Weight]:
    found: dict[Role, Weight] = {}
    for weight in weights:
        if weight.expert is not None:
            raise Untold(f"the MLP of {where} is a mixture of experts")
        if weight.role in found:
            raise Untold(f"{where} has several MLPs")
        reason = unreadable(model, weight)
        if reason:
            raise Untold(f"weight {weight.part} of {where} cannot be read: {reason}")
        if weight.beside:
            raise Untold(f"{', '.join(weight.beside)} add to weight {weight.part} of {where}")
        if not weight.direct:
            raise Untold(f"something lies between the stream, or attention, and weight {weight.part} of {where}")
        found[weight.role] = weight
    missing = [role for role in _ATTENTION if role not in found]
    if missing or ("up" in found) != ("down" in found):
        raise Untold(f"not all weights of {where} were found")
    return found
