"""Attention by scores that are carried from layer to layer: what Hopfield averaging and RealFormer have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.capture.reading import visible_in
from fullrank.edit import Call, Carried, Edit
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.attention.carried_scores import Step, coefficients, concatenated, left_out, needed
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Seen

__all__ = ["COST", "CUT", "LIMITS", "carry_scores", "layers_of"]

CUT = (
    Parameter(
        "keep",
        "how many layers' scores enter at most, the layer's own among them; none for all",
        None,
        kind="integer",
        low=1,
        optional=True,
    ),
    Parameter(
        "tolerance",
        "ε: the oldest layers whose weights add up to no more than this are left out",
        0.0,
        low=0.0,
        high=1.0,
    ),
)
"""Parameters that shorten what is carried."""

LIMITS = (
    "The mask and the position biases of each layer are its own and act on the sum, which is one of scores without "
    "them; in models that softmax by themselves biases are part of the scores, and what a layer hides counts as 0.",
    "Where layers are cut off, the scores that are left out are at most ε·max|s|, each row of the map is off by at "
    "most tanh(ε·max|s|/2) in total variation, and ε is printed with the repair.",
    "All layers must look at the same tokens with the same numbers of heads: not shifted windows, not stages.",
    "On CUDA, flash kernels end at head width 256: beyond it the memory-efficient kernel has to take the call, which "
    "PyTorch gives no shared key heads; which kernels take what there was not measured, on CPU it was.",
)
"""What is true of every rule."""

COST = (
    "fused kernels stay, on queries and keys as wide as those of all layers that enter, and values padded to it: time "
    "of the kernel and memory for queries and keys grow with their number, and stay linear in tokens where they were; "
    "no parameters; models that softmax by themselves keep one score matrix per layer"
)
"""In time, memory and parameters."""


def layers_of(patient: Patient, remedy: str) -> dict[tuple[str, str], list[Seen]]:
    """The self-attention calls that follow each other, by stack and part; of one form each.

    Args:
        patient: the model.
        remedy: for sentences.

    Returns:
        (stack, part) → calls in the order of layers.

    Raises:
        RemedyError: where no stack has two, or their tokens or heads differ.
    """
    found: dict[tuple[str, str], list[Seen]] = {}
    for site in patient.self_attention:
        for call in site.calls:
            found.setdefault((call.place.stack, call.place.part), []).append(call)
    found = {key: sorted(calls, key=lambda one: one.place.layer) for key, calls in found.items()}
    if all(len(calls) < 2 for calls in found.values()):
        raise RemedyError(f"{remedy} needs two layers of self-attention in a row, and this model has one.")
    for (stack, part), calls in found.items():
        for words, forms in (
            ("tokens", [(call.queries, call.keys) for call in calls]),
            ("heads (queries, keys)", [(call.heads, call.key_value_heads) for call in calls]),
            ("kernels", [("its own softmax" if call.width is None else "fused",) for call in calls]),
        ):
            other = next((n for n, form in enumerate(forms) if form != forms[0]), None)
            if other is not None:
                raise RemedyError(
                    f"{remedy} adds up what layers of {stack} share, and their {words} differ ({part}): {forms[0]} in "
                    f"layer {calls[0].place.layer}, {forms[other]} in layer {calls[other].place.layer}; use a remedy "
                    "that acts on one layer."
                )
    return found


def carry_scores(
    patient: Patient,
    remedy: str,
    rule: Callable[[int], Sequence[Step]],
    *,
    keep: int | None,
    tolerance: float,
) -> Edit:
    """Let every self-attention softmax the carried scores of its own and the layers before it.

    Args:
        patient: the model.
        remedy: its name.
        rule: of L layers.
        keep: how many layers enter at most.
        tolerance: how much of the weights may be left out.

    Returns:
        One handle; its notes say what is left out.

    Raises:
        RemedyError: where layers do not go together.
    """
    carried = Carried()
    scores = {
        key: _Scores(carried, [call.place.layer for call in calls], rule(len(calls)), keep, tolerance)
        for key, calls in layers_of(patient, remedy).items()
    }
    change = _Carrying(scores)
    edit = patient.rewrite(remedy, before=lambda site: change, after=lambda site: change.narrowed, carried=carried)
    edit.notes = tuple(one.said(stack) for (stack, _), one in scores.items() if any(one.left))
    return edit


class _Carrying:
    """What changes the calls: by stack and part."""

    def __init__(self, scores: Mapping[tuple[str, str], _Scores]) -> None:
        self.scores = scores

    def __call__(self, call: Call) -> Call:
        return self.scores[call.place.stack, call.place.part](call)

    def narrowed(self, call: Call, output: Tensor) -> Tensor:
        """The output without what came of columns of zeros."""
        return self.scores[call.place.stack, call.place.part].narrowed(call, output)


class _Scores:
    """The carried scores of the layers of one stack.

    Args:
        carried: what the layers of a forward share.
        layers: numbers of the block calls.
        rule: (f, w) of each.
        keep: how many enter at most.
        tolerance: how much of the weights may be left out.
    """

    def __init__(
        self, carried: Carried, layers: Sequence[int], rule: Sequence[Step], keep: int | None, tolerance: float
    ) -> None:
        self.carried, self.layers = carried, tuple(layers)
        self.turn = {layer: turn for turn, layer in enumerate(layers)}
        counts = [coefficients(rule[: turn + 1]) for turn in range(len(layers))]
        enter = [min(keep or len(c), needed(c, tolerance)) for c in counts]
        self.left = tuple(left_out(c, m) for c, m in zip(counts, enter, strict=True))
        self.counts = tuple(c[len(c) - m :] for c, m in zip(counts, enter, strict=True))

    def said(self, stack: str) -> str:
        """What the last layer leaves out, and what follows."""
        layers, entering, left = len(self.layers), len(self.counts[-1]), self.left[-1]
        return (
            f"the last of {layers} layers of {stack} sees the scores of {entering}; the weights of those left out add "
            f"up to ε = {left:.2g}, and rows of its map are off by at most tanh({left / 2:.2g}·max|s|)."
        )

    def __call__(self, call: Call) -> Call:
        turn = self.turn[call.place.layer]
        return self._fused(call, turn) if call.query is not None else self._explicit(call, turn)

    def narrowed(self, call: Call, output: Tensor) -> Tensor:
        """The output as wide as the values were."""
        if call.query is None:
            return output
        _, _, _, width = self.carried.get((call.place.stack, call.place.part, call.place.layer))
        return output[..., :width]

    def _keep(self, call: Call, turn: int, what: Any) -> list[Any]:
        """What the entering layers put down, this one's last."""
        stack, part = call.place.stack, call.place.part
        self.carried.put((stack, part, call.place.layer), what)
        entering = self.layers[turn + 1 - len(self.counts[turn]) : turn]
        return [self.carried.get((stack, part, layer)) for layer in entering] + [what]

    def _fused(self, call: Call, turn: int) -> Call:
        q, k = call.query, call.key
        assert q is not None
        assert k is not None
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        entering = self._keep(call, turn, (q, k, scale, call.value.shape[-1]))
        for one, _, _, _ in entering:
            if one.shape[:-1] != q.shape[:-1]:
                raise EditError(
                    f"scores cannot be carried to {call.place.path}: its queries are {tuple(q.shape)}, and those of a "
                    f"layer before it {tuple(one.shape)}."
                )
        for _, one, _, _ in entering:
            if one.shape[:-1] != k.shape[:-1]:
                raise EditError(
                    f"scores cannot be carried to {call.place.path}: its keys are {tuple(k.shape)}, and those of a "
                    f"layer before it {tuple(one.shape)}; caches that are cut to a window cannot be used with it."
                )
        weights = [c * own for c, (_, _, own, _) in zip(self.counts[turn], entering, strict=True)]
        Q, K = concatenated([one[0] for one in entering], [one[1] for one in entering], weights, scale)
        return call.change(query=Q, key=K, scale=scale, value=_padded(call.value, Q.shape[-1]))

    def _explicit(self, call: Call, turn: int) -> Call:
        logits = call.logits
        assert logits is not None
        seen = visible_in(logits)
        own = torch.where(seen, logits, 0.0)
        entering = self._keep(call, turn, own)
        if any(one.shape != own.shape for one in entering):
            raise EditError(f"scores cannot be carried to {call.place.path}: layers before it have others.")
        total = sum(c * one for c, one in zip(self.counts[turn], entering, strict=True))
        return call.change(logits=torch.where(seen, total, logits))


def _padded(value: Tensor, width: int) -> Tensor:
    """Values with columns of zeros: fused kernels of the CPU, and flash kernels, take one width for all three."""
    missing = width - value.shape[-1]
    wide = value.device.type == "cuda" and width > _FLASH  # there only kernels that take two widths are left
    return value if missing <= 0 or wide else functional.pad(value, (0, missing))


_FLASH = 256
"""Widest heads of flash kernels on CUDA."""
