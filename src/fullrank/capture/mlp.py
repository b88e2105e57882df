"""Which weights are up, gate and down of the MLPs of a block.

From the block's output upstream to the last products before the additions to the stream: those that no attention call
feeds are the down projections. What they read leads to the first products before them, up; where two of these are
multiplied with each other, the one that went through the nonlinearity is the gate. Products between which tokens are
mixed (state-space layers) or that read the stream themselves (routers) are no MLP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from fullrank.capture.lineage import Ref
from fullrank.capture.products import Product
from fullrank.capture.roles import beside, weight_of
from fullrank.capture.upstream import Hit, Region, origin
from fullrank.capture.ways import Way
from fullrank.capture.weights import Role, Weight

__all__ = ["mlp_roles"]

_MULTIPLY = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__"})


@dataclass(eq=False)
class _Branch:
    """Some outputs of one product that become one factor of what the down projection reads."""

    product: Product
    features: tuple[int, ...]
    nonlinear: bool
    halved: bool


def mlp_roles(model: nn.Module, block: str, region: Region, output: Ref, attended: set[int]) -> list[Weight]:
    """The weights of the MLPs of one block.

    Args:
        model: the model.
        block: name of the block.
        region: its calls.
        output: what it returned.
        attended: orders of products that read what an attention call returned.

    Returns:
        For each MLP, in order, up, gate (where there is one) and down; of a mixture those of every expert, of which
        some may not have been called.
    """
    hits, _ = region.up(output)
    downs: dict[int, Product] = {}
    for hit in hits:
        if hit.node.order in attended or hit.node.order in downs:
            continue
        inner, opaque = region.up(hit.product.reads)
        if opaque or not inner or any(one.mixing for one in inner):
            continue
        if all(one.node.order in attended for one in inner):
            continue
        downs[hit.node.order] = hit.product
    adapters = _adapters(list(downs.values()), region)
    mains = [product for order, product in downs.items() if order not in adapters]
    found: list[Weight] = []
    for number, group in enumerate(_in_turn(mains, region)):
        call = f"mlp.{number}" if number else "mlp"
        sets = [
            _one(call, product, [downs[o] for o, main in adapters.items() if main == product.node.order], region)
            for product in group
        ]
        found.extend(_experts(model, block, sets))
    return list(dict.fromkeys(found))


def _adapters(products: list[Product], region: Region) -> dict[int, int]:
    """Second factors of low-rank adapters, with the product they are added to: their first factor reads the same."""
    found = {}
    for product in products:
        firsts = {hit.node.order: hit.product for hit in region.up(product.reads)[0]}
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


def _one(call: str, down: Product, adapters: list[Product], region: Region) -> list[Weight]:
    place = torch.Size(down.reads.shape[axis] for axis in down.contracted).numel()
    branches = [b for b in _branches(region.up(down.reads)[0], region) if len(b.features) == place or b.halved]
    weights = [weight_of("down", call, down, adapters, None, [])]
    if not branches:
        return [Weight("up", call, reason="what the down projection reads could not be followed"), *weights]
    if all(branch.halved for branch in branches):  # F.glu: the first half times the sigmoid of the second
        half = len(branches[0].features) // 2
        product, features = branches[0].product, branches[0].features
        up = weight_of("up", call, product, [], list(features[:half]), [])
        return [up, weight_of("gate", call, product, [], list(features[half:]), []), *weights]
    sides = _sides(down.reads, region, place)
    if sides is None:
        return [_role("up", call, branches, region), *weights]
    gates = [side for side in sides if any(branch.nonlinear for branch in side)]
    if len(gates) != 1:
        reason = "of the two factors before the down projection it could not be told which is the gate"
        return [Weight(role, call, reason=reason) for role in ("up", "gate")] + weights
    linear = sides[1] if gates[0] is sides[0] else sides[0]
    return [_role("up", call, linear, region), _role("gate", call, gates[0], region), *weights]


def _role(role: Role, call: str, branches: list[_Branch], region: Region) -> Weight:
    products = list({branch.product.node.order: branch.product for branch in branches}.values())
    features = {branch.product.node.order: list(branch.features) for branch in branches}
    main, others = beside(products, region, {order: len(found) for order, found in features.items()})
    return weight_of(role, call, main, others, features[main.node.order], [])


def _branches(hits: Iterable[Hit], region: Region) -> list[_Branch]:
    found: dict[tuple[int, tuple[int, ...]], _Branch] = {}
    for hit in hits:
        features = _features(hit)
        branch = found.setdefault(
            (hit.node.order, features), _Branch(hit.product, features, False, hit.tip in region.halved)
        )
        branch.nonlinear |= hit.nonlinear
    return list(found.values())


def _features(hit: Hit) -> tuple[int, ...]:
    numbers = Way(Ref(hit.node, 0), hit.product.features).to(hit.tip)
    if numbers is None:
        return tuple(range(torch.Size(hit.node.shapes[0][axis] for axis in hit.product.features).numel()))
    for axis in range(numbers.ndim):
        if numbers.shape[axis] > 1 and numbers.stride(axis) == 0:
            numbers = numbers.narrow(axis, 0, 1)
    return tuple(int(number) for number in dict.fromkeys(numbers.flatten().tolist()) if number >= 0)


def _sides(start: Ref, region: Region, width: int) -> tuple[list[_Branch], list[_Branch]] | None:
    """The two factors of the product, entry by entry, that the down projection reads; None where there is none."""
    waiting, seen = [start], set()
    while waiting:
        ref = max(waiting, key=lambda ref: ref.node.order)
        waiting.remove(ref)
        node = ref.node
        if node.order in seen or region.product(node) is not None or region.ends(ref):
            continue
        seen.add(node.order)
        parents = [parent for parent in node.parents if parent.node.floating and parent.node.data]
        if node.name in _MULTIPLY and len(parents) == 2:
            both = [[b for b in _branches(region.up(p)[0], region) if len(b.features) == width] for p in parents]
            keys = [{(b.product.node.order, b.features) for b in side} for side in both]
            if keys[0] and keys[1] and keys[0] != keys[1]:
                return both[0], both[1]
        waiting.extend(parents)
    return None


# ---------------------------------------------------------------- mixtures


def _experts(model: nn.Module, block: str, sets: list[list[Weight]]) -> list[Weight]:
    """Number the experts of a mixture, those that no token was sent to included."""
    found: list[Weight] = []
    for weights in sets:
        if any(weight.stacked for weight in weights):
            for weight in weights:
                count = _count(model, weight)
                found.extend(replace(weight, expert=expert) for expert in range(count))
            continue
        place = _listed(model, block, weights, sets)
        if place is None:
            found.extend(weights)
            continue
        path, own = place
        for number, name in enumerate(dict(model.get_submodule(path).named_children())):
            old, new = f"{path}.{own}.", f"{path}.{name}."
            found.extend(
                replace(
                    weight,
                    parameter=weight.parameter.replace(old, new, 1),
                    beside=tuple(other.replace(old, new, 1) for other in weight.beside),
                    expert=number,
                )
                for weight in weights
            )
    return found


def _count(model: nn.Module, weight: Weight) -> int:
    from fullrank.capture.weights import shape_of_parameter

    shape = shape_of_parameter(model, weight)
    return shape[0] if weight.stacked and shape else 1


def _listed(model: nn.Module, block: str, weights: list[Weight], sets: list[list[Weight]]) -> tuple[str, str] | None:
    """The list of modules that a set of weights is one of the experts of, and its own name in it."""
    from fullrank.capture.reference import module_names

    name = weights[-1].parameter
    lists = {
        known: module
        for module, known in module_names(model).items()
        if isinstance(module, nn.ModuleList | nn.ModuleDict)
        and name.startswith(f"{known}.")
        and known.startswith(block)
    }
    for path, module in lists.items():
        children = dict(module.named_children())
        if len(children) < 2 or len({type(child) for child in children.values()}) > 1:
            continue
        own = name[len(path) + 1 :].split(".")[0]
        return path, own
    return None
