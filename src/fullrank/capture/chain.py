"""Networks without repeated modules: their layers of weights, one after the other, are the blocks."""

from __future__ import annotations

import itertools

from fullrank.capture.visits import Visit

__all__ = ["chain_of", "end_of"]


def chain_of(weights: list[Visit]) -> tuple[list[Visit], str] | None:
    """The layers of weights of a plain feed-forward network, and the module with which the last of them ends.

    Every layer must read what the layer before it made, whatever lies in between (norms, activations, pooling, written
    as modules or as functions), on the same batch. The state after a layer is what the next one is called with. A last
    layer whose output the network returns as it is, in another shape than it was given, is a head and no block.

    Args:
        weights: the calls of all layers of weights of one forward, in order.

    Returns:
        At least two layers and the path of the module that ends them; None where this is no such network.
    """
    if len(weights) < 2 or not all(later.reads & before.weight for before, later in itertools.pairwise(weights)):
        return None
    if any(visit.shape is None or visit.returned is None for visit in weights):
        return None
    if len({visit.shape[0] for visit in weights if visit.shape is not None}) > 1:
        return None
    last = weights[-1]
    around = end_of(weights)
    if around is None:
        return None
    if any(visit is last for visit in around.hands) and last.returned != last.shape:
        return (weights[:-1], last.path) if len(weights) > 2 else None
    return weights, around.path


def end_of(visits: list[Visit]) -> Visit | None:
    """The innermost module call around all of these."""
    first = {id(visit) for visit in visits[0].ancestors()}
    return next((visit for visit in visits[-1].ancestors() if id(visit) in first), None)
