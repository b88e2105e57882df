"""Which weights are up, gate and down of the MLPs of a block.

From the block's output upstream to the last products before the additions to the stream: those that no attention call
feeds are the down projections. What they read leads to the first products before them, up; where two of these are
multiplied with each other, the one that went through the nonlinearity is the gate. Products between which tokens are
mixed (state-space layers) or that read the stream themselves (routers) are no MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fullrank.capture.experts import experts
from fullrank.capture.lineage import Ref
from fullrank.capture.products import Product
from fullrank.capture.roles import beside, weight_of
from fullrank.capture.upstream import Region, origin
from fullrank.capture.ways import Way, compact
from fullrank.capture.weights import Role, Weight

__all__ = ["mlp_roles"]

_MULTIPLY = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__"})


@dataclass(eq=False)
class _Branch:
    """Some outputs of one product that become one factor of what the down projection reads."""

    product: Product
    features: tuple[int, ...]
    nonlinear: bool


def mlp_roles(
    model: nn.Module, block: str, region: Region, output: Ref, attended: set[int], states: set[int]
) -> list[Weight]:
    """The weights of the MLPs of one block.

    Args:
        model: the model.
        block: name of the block.
        region: its calls.
        output: what it returned.
        attended: orders of products that feed an attention call or read what it returned.
        states: orders of calls that hand the stream on.

    Returns:
        For each MLP, in order, up, gate (where there is one) and down; of a mixture those of every expert, of which
        some may not have been called.
    """
    downs: dict[int, Product] = {}
    waiting, seen = region.up(output)[0], set()
    while waiting:
        hit = waiting.pop(0)
        if hit.node.order in attended or hit.node.order in seen or hit.mixing:
            continue
        seen.add(hit.node.order)
        inner, opaque = region.up(hit.product.reads, states)
        if any(one.node.order in attended for one in inner):
            waiting.extend(inner)  # it leads out of a narrower stream inside the block
        elif inner and not opaque and not any(one.mixing or _mixes(one.product) for one in (hit, *inner)):
            downs[hit.node.order] = hit.product
    adapters = _adapters(list(downs.values()), region, states)
    mains = [product for order, product in downs.items() if order not in adapters]
    others = {order: [downs[o] for o, main in adapters.items() if main == order] for order in downs}
    groups = [
        [
            _one(f"mlp.{number}" if number else "mlp", product, others[product.node.order], region, states)
            for product in group
        ]
        for number, group in enumerate(_in_turn(mains, region))
    ]
    groups = [found for group in groups if (found := [weights for weights in group if weights])]
    every = {weights[-1].parameter for group in groups for weights in group}
    return list(dict.fromkeys(weight for group in groups for weight in experts(model, block, group, every)))


def _mixes(product: Product) -> bool:
    """A convolution over several places."""
    return product.weight is not None and product.weight.shape[2:].numel() > 1 and product.node.name.startswith("conv")


def _adapters(products: list[Product], region: Region, states: set[int]) -> dict[int, int]:
    """Second factors of low-rank adapters, with the product they are added to: their first factor reads the same."""
    found = {}
    for product in products:
        firsts = {hit.node.order: hit.product for hit in region.up(product.reads, states)[0]}
        for other in products:
            same = all(origin(first.reads) == origin(other.reads) for first in firsts.values())
            if other is not product and firsts and same:
                found[product.node.order] = other.node.order
    return found


def _in_turn(products: list[Product], region: Region) -> list[list[Product]]:
    """Products that work side by side in one group, those that build on others in a later one."""
    groups: list[list[Product]] = []
    for product in sorted(products, key=lambda product: product.node.order):
        for level, group in enumerate(groups):
            if not region.depends(product.reads.node, {other.node.order for other in group}):
                groups[level].append(product)
                break
        else:
            groups.append([product])
    return groups


def _one(call: str, down: Product, adapters: list[Product], region: Region, states: set[int]) -> list[Weight]:
    width = torch.Size(down.reads.shape[axis] for axis in down.contracted).numel()
    firsts = [hit.product for adapter in adapters for hit in region.up(adapter.reads, states)[0]]
    weights = [weight_of("down", call, down, [*firsts, *adapters], None, [])]
    sides = _sides(down.reads, region, width, states)
    if sides is not None and any(all(region.up(b.product.reads, states)[0] for b in side) for side in sides):
        return []  # what is multiplied was made in several steps: a modulation, no MLP
    if sides is None:
        branches = _branches(down.reads, region, width, states)
        if not branches:
            return [Weight("up", call, reason="what the down projection reads could not be followed"), *weights]
        return [_role("up", call, branches, region, states), *weights]
    gates = [side for side in sides if any(branch.nonlinear for branch in side)]
    if len(gates) != 1:
        reason = "of the two factors before the down projection it could not be told which is the gate"
        return [Weight("up", call, reason=reason), Weight("gate", call, reason=reason), *weights]
    linear = sides[1] if gates[0] is sides[0] else sides[0]
    up, gate = _role("up", call, linear, region, states), _role("gate", call, gates[0], region, states)
    return [up, gate, *weights]


def _role(role: Role, call: str, branches: list[_Branch], region: Region, states: set[int]) -> Weight:
    products = [branch.product for branch in branches]
    features = {branch.product.node.order: list(branch.features) for branch in branches}
    main, others = beside(products, region, {order: len(found) for order, found in features.items()}, states)
    return weight_of(role, call, main, others, features[main.node.order], [])


def _branches(ref: Ref, region: Region, width: int, states: set[int]) -> list[_Branch]:
    """Products that a tensor is made of, with their features that are left in it, where these are as many as wanted."""
    found = []
    for hit in region.up(ref, states)[0]:
        features = _features(hit.product, ref)
        if len(features) == width:
            found.append(_Branch(hit.product, features, hit.nonlinear))
    return found


def _features(product: Product, ref: Ref) -> tuple[int, ...]:
    numbers = Way(product.node.out, product.features).to(ref)
    if numbers is None:
        return tuple(range(torch.Size(product.node.shapes[0][axis] for axis in product.features).numel()))
    return tuple(sorted(int(number) for number in compact(numbers).unique().tolist() if number >= 0))


def _sides(start: Ref, region: Region, width: int, states: set[int]) -> tuple[list[_Branch], list[_Branch]] | None:
    """The two factors of the product, entry by entry, that the down projection reads; None where there is none."""
    waiting, seen = [start], set()
    while waiting:
        ref = max(waiting, key=lambda ref: ref.node.order)
        waiting.remove(ref)
        node = ref.node
        if node.order in seen or node.order in states or region.product(node) is not None or region.ends(ref):
            continue
        seen.add(node.order)
        parents = [parent for parent in node.parents if parent.node.floating and parent.node.data]
        if node.name == "glu":  # the first half times the sigmoid of the second
            whole = _branches(parents[0], region, 2 * width, states)
            linear = [_Branch(b.product, b.features[:width], nonlinear=False) for b in whole]
            gates = [_Branch(b.product, b.features[width:], nonlinear=True) for b in whole]
            return (linear, gates) if whole else None
        if node.name in _MULTIPLY and len(parents) == 2:
            both = [_branches(parent, region, width, states) for parent in parents]
            keys = [{(b.product.node.order, b.features) for b in side} for side in both]
            if keys[0] and keys[1] and keys[0] != keys[1]:
                return both[0], both[1]
        waiting.extend(parents)
    return None
