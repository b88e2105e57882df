"""Weights brought to a standard deviation: those that are there rescaled, or drawn anew."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.capture.weights import Weight, matrix
from fullrank.edit import Edit
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.weighing import change_weights, head_rows

__all__ = ["HOW", "SEED", "sized", "sized_weights", "unscaled_queries"]

HOW = Parameter(
    "how",
    "whether present weights are multiplied by one number each, or independent normal ones are drawn",
    "rescale",
    kind="choice",
    choices=("rescale", "draw"),
)
SEED = Parameter("seed", "of what is drawn", 0, kind="integer", low=0, high=2**31)


def sized_weights(
    patient: Patient, std: Callable[[str, int, Weight, int], float], *roles: str, how: str, seed: int
) -> Edit:
    """Bring the root mean square of weights' entries to what it is to be.

    Args:
        patient: the model.
        std: of (stack, layer, weight, number of inputs).
        roles: of `q k v o up gate down`.
        how: `rescale` or `draw`.
        seed: of what is drawn.

    Returns:
        The handle.

    Raises:
        RemedyError: where a weight is not known, or is zero and to be rescaled.
    """
    generator = torch.Generator().manual_seed(seed)

    def new(stack: str, layer: int, weight: Weight) -> Callable[[Tensor], Tensor]:
        name = f"the weight {weight.part!r} of layer {layer}"
        return lambda W: sized(W, std(stack, layer, weight, W.shape[1]), how, generator, name)

    return change_weights(patient, new, *roles)


def sized(W: Tensor, std: float, how: str, generator: torch.Generator, name: str) -> Tensor:
    """A tensor with entries of root mean square `std`: W times a number, or a normal draw of its shape.

    Args:
        W: present values.
        std: what is wanted.
        how: `rescale` or `draw`.
        generator: on the CPU.
        name: for the sentence.

    Returns:
        Of the shape of W.

    Raises:
        RemedyError: where W is zero and to be rescaled.
    """
    if how == "draw":
        return (std * torch.randn(W.shape, generator=generator)).to(W)
    rms = float(W.to(torch.promote_types(W.dtype, torch.float32)).square().mean().sqrt())
    if not 0 < rms < math.inf:
        raise RemedyError(f"{name} cannot be rescaled to a size: its root mean square is {rms:g}; use how=draw.")
    return W * (std / rms)


def unscaled_queries(patient: Patient) -> Callable[[str, int, Weight], float]:
    """What W_Q has to carry where the model's scores are not scaled by 1/√d_h, as in T5: 1/(scale·√d_h), else 1.

    Where a model does not show its queries it is taken to scale them.

    Returns:
        A function of (stack, layer, weight); 1 for every other role.
    """
    scales = {
        (seen.place.stack, seen.place.layer, seen.place.part): seen.scale
        for site in patient.sites
        for seen in site.calls
    }

    def factor(stack: str, layer: int, weight: Weight) -> float:
        scale = scales.get((stack, layer, weight.call)) if weight.role == "q" else None
        if scale is None:
            return 1.0
        heads = head_rows(weight)
        width = len(heads[0]) if heads else matrix(patient.model, weight).shape[0]
        return 1 / (scale * math.sqrt(width))

    return factor
