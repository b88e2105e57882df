"""The sign of what attention writes: W_O such that every eigenvalue of W_V W_O has the wished sign."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fullrank.capture.weights import Weight, matrix, per_head
from fullrank.edit import Edit
from fullrank.errors import RemedyError
from fullrank.remedies.covering import identities, notes_on_branches
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import change_weights, head_rows

__all__ = ["nearest", "tied", "value_output_sign"]


def tied(v: Tensor, o: Tensor, sign: float) -> Tensor:
    """±c·W_Vᵀ in place of W_O, c > 0 such that its Frobenius norm stays: W_O W_V = ±c W_VᵀW_V.

    Args:
        v: W_V of a head, (width of the head, d).
        o: its W_O, (d, width of the head).
        sign: 1 or −1.

    Returns:
        (d, width of the head).
    """
    W_O: Tensor = sign * v.mT * (o.norm() / v.norm())
    return W_O


def nearest(v: Tensor, o: Tensor, sign: float) -> Tensor:
    """The W_O whose product with W_V is semidefinite, of the sign, and nearest to what it was.

    With W_Vᵀ = QR every such product is ±QPQᵀ, P positive semidefinite, and ‖±QPQᵀ − W_O W_V‖ is least for the positive
    part of the symmetric part of ±QᵀW_O Rᵀ.

    Args:
        v: W_V of a head, (width of the head, d).
        o: its W_O, (d, width of the head).
        sign: 1 or −1.

    Returns:
        (d, width of the head).
    """
    Q, R = torch.linalg.qr(v.mT)
    S = sign * (Q.mT @ o @ R.mT)
    lam, E = torch.linalg.eigh((S + S.mT) / 2)
    P = (E * lam.clamp(min=0)) @ E.mT
    W_O: Tensor = sign * Q @ P @ torch.linalg.pinv(R).mT
    return W_O


@remedy(
    "value-output-sign",
    "W_O such that attention subtracts from the stream what it gathers",
    addresses=("rank-collapse-depth", "averaging-heads"),
    acts_on="weights",
    exactness="init-only",
    formula="H = Σ_h W_V^h W_O^h; tie: W_O^h ← −c_h W_V^hᵀ, so that eig H ∈ [−1, 0]: X + AXH has modes 1 + λ_H λ_A "
    "of size ≤ 1 where λ_A ∈ [0, 1], the mean (λ_A = 1) shrunk most, and < 2 always",
    papers=("Dovonon, Bronstein, Kusner: Setting the record straight …, arXiv 2401.04301",),
    keys=("oversmoothing_fixes",),
    parameters=(
        Parameter(
            "sign",
            "of the eigenvalues; positive makes tokens alike for certain",
            "negative",
            kind="choice",
            choices=("negative", "positive"),
        ),
        Parameter(
            "method",
            "tie: W_O^h from W_V^h, at the size of W_O^h; nearest: the W_O^h with W_V^h W_O^h semidefinite and "
            "nearest to what it was; flip: the sign of W_O^h where the trace of W_V^h W_O^h has the other one",
            "tie",
            kind="choice",
            choices=("tie", "nearest", "flip"),
        ),
        Parameter(
            "largest",
            "of tie and nearest: the largest |eigenvalue| of H at most, by one factor for all heads; none: as it comes",
            1.0,
            above=0.0,
            low=0.0,
            optional=True,
        ),
    ),
    limits=(
        "For fresh weights: tie forgets W_O, and nearest most of it.",
        "flip decides over the mean of a head's eigenvalues only: of independent random W_V and W_O half stay of the "
        "other sign and tokens still become alike.",
        "The paper's H is one matrix V·diag(−ψ²)·V⁻¹; a head has W_V W_O of its rank, and H is their sum. Heads with "
        "maps of their own, the MLP and a norm after the sum (post-norm) are outside of its theorem.",
        "Gains of the norm in front of W_V are taken to be positive and alike; biases stay as they are.",
    ),
    cost="none; when applied one eigendecomposition per head (nearest) and one norm per layer",
    structural=False,
)
def value_output_sign(
    patient: Patient, *, sign: str = "negative", method: str = "tie", largest: float | None = 1.0
) -> Edit:
    """Give H = Σ W_V W_O the wished sign by changing W_O."""
    s = 1.0 if sign == "positive" else -1.0
    values = {(stack, layer, weight.call): weight for stack, layer, weight in patient.weights("v", part="self")}
    _check_shared(patient, values)
    notes = notes_on_branches(patient)

    def new(stack: str, layer: int, weight: Weight) -> Callable[[Tensor], Tensor]:
        value = values.get((stack, layer, weight.call))
        heads = head_rows(weight)
        where = f"{stack} layer {layer}"
        if value is None or not heads or len(value.heads) != len(heads):
            raise RemedyError(f"the heads of W_V and W_O of {where} are not known.")
        beside = (*value.beside, *weight.beside)
        if beside:
            raise RemedyError(
                f"{beside[0]} adds to W_V or W_O of {where}, as adapters do: the sign would hold without it alone; "
                "merge it first, or apply this before it is added."
            )
        if not (value.direct and weight.direct):
            raise RemedyError(
                f"between W_V and W_O of {where} stands more than attention: W_V W_O is not what it writes."
            )
        v = [head.double() for head in per_head(patient.model, value)]
        o = [head.double() for head in per_head(patient.model, weight)]
        for name, each in (("W_V", v), ("W_O", o)):
            zero = next((number for number, head in enumerate(each, 1) if not bool(head.any())), None)
            if zero is not None:
                why = "no W_O gives a sign to its product" if name == "W_V" else "there is no size of it to be kept"
                raise RemedyError(f"{name} of head {zero} of {where} is zero: {why}.")
        if v[0].shape[1] != matrix(patient.model, weight).shape[0]:
            raise RemedyError(f"W_V of {where} does not read the stream that W_O writes to.")

        def change(W: Tensor) -> Tensor:
            o = W.double()
            H = torch.zeros(o.shape[0], o.shape[0], dtype=o.dtype, device=o.device)
            for columns, head in zip(heads, v, strict=True):
                o[:, columns] = _head(head, o[:, columns], s, method)
                H += o[:, columns] @ head
            top = float(torch.linalg.matrix_norm(H, 2)) if method != "flip" and largest is not None else 0.0
            return o * (largest / top) if largest is not None and top > largest else o

        return change

    edit = change_weights(patient, new, "o", part="self")
    edit.notes += notes
    return edit


def _check_shared(patient: Patient, values: Mapping[tuple[str, int, str], Weight]) -> None:
    held = identities(patient)

    def numbers(weight: Weight) -> tuple[object, ...]:
        return held.get(weight.parameter, weight.parameter), weight.rows, weight.columns

    served: dict[tuple[object, ...], tuple[object, ...]] = {}
    for stack, layer, weight in patient.weights("o", part="self"):
        value = values.get((stack, layer, weight.call))
        if value is not None and served.setdefault(numbers(weight), numbers(value)) != numbers(value):
            raise RemedyError(
                f"W_O of {stack} layer {layer} serves another layer too, of which W_V differs: no W_O has the sign for "
                "both."
            )


def _head(v: Tensor, o: Tensor, sign: float, method: str) -> Tensor:
    if method == "flip":
        trace = (o.mT * v).sum()
        return torch.where(trace * sign < 0, -o, o)
    return tied(v, o, sign) if method == "tie" else nearest(v, o, sign)
