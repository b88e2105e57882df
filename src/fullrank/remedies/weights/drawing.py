"""Weights brought to a standard deviation: those that are there rescaled, or drawn anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.capture.weights import Weight
from fullrank.edit import Edit
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.weighing import change_weights, head_rows
from fullrank.remedies.weights.score_scale import Key, score_scales

__all__ = ["HOW", "SEED", "Unscaled", "ratio_to", "sized", "sized_weights", "unscaled_queries"]

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
    return W * ratio_to(W, std, name)


def ratio_to(W: Tensor, std: float, name: str) -> float:
    """By what W is multiplied to have entries of root mean square `std`.

    Args:
        W: present values.
        std: what is wanted.
        name: for the sentence.

    Returns:
        The number.

    Raises:
        RemedyError: where W is zero.
    """
    rms = float(W.to(torch.promote_types(W.dtype, torch.float32)).square().mean().sqrt())
    if not 0 < rms < math.inf:
        raise RemedyError(f"{name} cannot be rescaled to a size: its root mean square is {rms:g}; use how=draw.")
    return std / rms


@dataclass(frozen=True)
class Unscaled:
    """What W_Q has to carry where scores are not scaled by 1/√d_h: 1/(c·√d_h) for scores c·q·k.

    Attributes:
        scales: c by stack, layer and part.
        widths: d_h likewise.
        notes: sentences on what was not seen.
    """

    scales: Mapping[Key, float]
    widths: Mapping[Key, int]
    notes: tuple[str, ...] = ()

    def __call__(self, stack: str, layer: int, weight: Weight) -> float:
        """The factor of a weight; 1 for every role but `q`, and where its size changes no score."""
        c = self.scales.get((stack, layer, weight.call), math.inf) if weight.role == "q" else math.inf
        if math.isinf(c):
            return 1.0
        heads = head_rows(weight)
        width = len(heads[0]) if heads else self.widths[stack, layer, weight.call]
        factor = 1 / (c * math.sqrt(width))
        return 1.0 if abs(factor - 1) < 1e-3 else factor  # of rotary embeddings, which are rounded


def unscaled_queries(patient: Patient) -> Unscaled:
    """What W_Q has to carry where the model's scores are not scaled by 1/√d_h, as in T5.

    It is measured (`score_scales`), since models scale in the kernel, in front of it, or not at all. Where it cannot
    be, queries and keys are taken to reach the kernel as W_Q and W_K make them, and a model that softmaxes by itself is
    taken to scale by 1/√d_h; a note says so.

    Args:
        patient: the model.

    Returns:
        A function of (stack, layer, weight).
    """
    calls = {
        (seen.place.stack, seen.place.layer, seen.place.part): seen for site in patient.sites for seen in site.calls
    }
    measured, scales, unseen = score_scales(patient), {}, []
    for key, seen in calls.items():
        c = measured.get(key)
        if c is None:
            unseen.append(f"{key[0]} layer {key[1]} ({key[2]})")
            c = math.inf if seen.scale is None else seen.scale
        scales[key] = c
    widths = {key: seen.width or seen.value_width for key, seen in calls.items()}
    if not unseen:
        return Unscaled(scales, widths)
    where = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
    return Unscaled(
        scales,
        widths,
        (
            f"How {where} scales its scores was not seen: they are no multiple of what W_Q and W_K make. W_Q is sized "
            "as if it were told to the kernel, or 1/√d_h.",
        ),
    )
