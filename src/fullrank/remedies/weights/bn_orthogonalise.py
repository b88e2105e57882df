"""Iterative orthogonalisation: weights that flatten the spectrum of the batch, layer by layer, without batch norm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.capture.reference import reference_path
from fullrank.capture.weights import Weight
from fullrank.edit import Edit, together
from fullrank.edit.places import module_at
from fullrank.errors import RemedyError
from fullrank.remedies.covering import identities, notes_on_branches, notes_on_rest
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import changed, check_weight

__all__ = ["bn_orthogonalise", "flattening"]

_ROLES = {
    "first": ("v", "up", "gate"),
    "attention": ("v",),
    "mlp": ("up", "gate"),
    "all": ("v", "o", "up", "gate", "down"),
}


def flattening(W: Tensor, H: Tensor, power: float, floor: float) -> Tensor:
    """c·Q·U S^−power Uᵀ of H = U S Vᵀ: what it makes of H has singular values c·S^(1−power) where Q is orthogonal.

    Q is the matrix with orthonormal rows or columns that is nearest to W; directions that H does not show, or below
    `floor` times its largest singular value, are treated as that one; c keeps ‖WH‖.

    Args:
        W: (out, in).
        H: (tokens, in).
        power: 1/2 in the paper; 1 makes all singular values equal.
        floor: relative.

    Returns:
        (out, in); NaN where H is 0, or all that Q reads of it.
    """
    lam, U = torch.linalg.eigh(H.mT @ H)
    s = lam.clamp(min=0).sqrt()
    s = s.clamp(min=floor * float(s.max()))
    left, _, right = torch.linalg.svd(W, full_matrices=False)
    new = (left @ right) @ (U * s**-power) @ U.mT
    flattened: Tensor = new * ((H @ W.mT).norm() / (H @ new.mT).norm())
    return flattened


@remedy(
    "bn-orthogonalise",
    "weights that make the tokens of a batch orthogonal, layer by layer",
    addresses=("rank-collapse-depth", "rank-collapse-width", "dead-depth"),
    acts_on="weights",
    exactness="init-only",
    formula="H = USVᵀ what the weight reads of the batch; W ← c·Q·US^−½Uᵀ, Q the orthogonal factor of W, c such that "
    "‖WH‖ stays; WH has the singular values c·S^½; W_V, W_up and W_gate, each on what the layers before it make by "
    "then",
    papers=("Daneshmand, Joudaki, Bach 2021, arXiv 2106.03970 (iterative orthogonalisation, for MLPs)",),
    keys=("batchnorm",),
    parameters=(
        Parameter("power", "½ in the paper; 1 flattens at once", 0.5, above=0.0, low=0.0, high=1.0),
        Parameter(
            "floor", "smaller singular values of H, over the largest, are taken as this", 1e-3, above=0.0, high=1.0
        ),
        Parameter(
            "roles",
            "which weights: those that read the stream (of attention, of the MLP), or W_O and W_down too",
            "first",
            kind="choice",
            choices=("first", "attention", "mlp", "all"),
        ),
    ),
    limits=(
        "For fresh weights and the batch that is given: it replaces what was learnt, and holds for inputs like these.",
        "The paper is of MLPs, with every weight and at least as many samples as inputs. Here by default what reads "
        "the stream into a value or a hidden unit; roles=all takes W_O and W_down too, but for "
        "nn.MultiheadAttention. All tokens of the batch count, padding too. With fewer tokens than inputs, "
        "directions that the batch does not show count as the smallest that it shows.",
        "The singular values of WH are exact where the weight has at least as many rows as inputs; with fewer (W_V of "
        "grouped queries) they are those of a part of H.",
        "Q is a random orthogonal matrix in the paper and the one nearest to the present weights here; c keeps the "
        "size where the paper makes it 1.",
        "Mixtures of experts are refused: each expert reads other tokens. A block that is called several times is "
        "set by its first call, and so is a weight that several modules share.",
        "A weight that reads nothing but zeros is refused, such as W_down behind a W_up of 0.",
    ),
    cost="one forward and two decompositions per weight when it is applied; none later",
    structural=False,
)
def bn_orthogonalise(patient: Patient, *, power: float = 0.5, floor: float = 1e-3, roles: str = "first") -> Edit:
    """Flatten the spectrum of what W_V, W_up and W_gate make of the batch, in one forward."""
    of_module: dict[str, list[Weight]] = {}
    held = identities(patient)
    seen: set[tuple[object, ...]] = set()
    for stack, layer, weight in patient.weights(*_ROLES[roles]):
        where = f"{weight.part!r} of {stack} layer {layer}"
        check_weight(patient, layer, weight)
        if weight.expert is not None:
            raise RemedyError(f"{where} is of an expert, which reads a part of the tokens; use roles=attention.")
        if weight.call.startswith("cross"):
            continue
        part = (held.get(weight.parameter, weight.parameter), weight.rows, weight.columns)
        if part not in seen:  # a weight that several modules share is set once
            seen.add(part)
            of_module.setdefault(weight.parameter.rpartition(".")[0], []).append(weight)
    if not of_module:
        raise RemedyError(f"no such weights were found in this {type(patient.model).__name__}.")
    weights = [weight for parts in of_module.values() for weight in parts]
    notes = notes_on_branches(patient) + notes_on_rest(patient, _ROLES[roles], weights)
    edits: list[Edit] = []
    left = dict(of_module)

    def setter(path: str) -> Callable[..., None]:
        def reads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())
            edits.extend(_flattened(patient, weight, given, power, floor) for weight in left.pop(path, ()))

        return reads

    try:
        with ExitStack() as put_back:
            put_back.enter_context(undisturbed(patient.model))
            put_back.enter_context(reference_path(patient.model, []))
            for path in of_module:
                module = module_at(patient.model, path)
                _check_reader(module, path)
                put_back.callback(module.register_forward_pre_hook(setter(path), with_kwargs=True).remove)
            patient.forward()
        if left:
            raise RemedyError(f"{next(iter(left))} is not called as a module, so that what it reads is not seen.")
    except BaseException:
        for edit in reversed(edits):
            edit.undo()
        raise
    edit = together(edits)
    edit.notes += notes
    return edit


def _check_reader(module: nn.Module, path: str) -> None:
    """Refuse modules that do more to their input than multiply it by their weight."""
    own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    inside = any(True for child in module.children() for _ in child.parameters())
    if (len(own) != 1 or inside) and not isinstance(module, nn.MultiheadAttention):
        raise RemedyError(f"{path} computes more than a product with one weight, so that what that reads is not seen.")


def _flattened(patient: Patient, weight: Weight, given: tuple[Any, ...], power: float, floor: float) -> Edit:
    def new(W: Tensor) -> Tensor:
        states = (one for one in given if isinstance(one, Tensor) and one.is_floating_point())
        H = next((one for one in states if one.shape[-1] == W.shape[1]), None)
        if H is None:
            raise RemedyError(f"what {weight.parameter} reads was not seen.")
        wide = torch.promote_types(W.dtype, torch.float64)
        H = H.detach().reshape(-1, H.shape[-1]).to(wide)
        if not bool(H.isfinite().all()) or not bool(H.any()):
            what = "nothing but zeros" if bool(H.isfinite().all()) else "values that are not finite"
            raise RemedyError(f"{weight.parameter} reads {what} on this batch, so that no weights flatten it.")
        made = flattening(W.to(wide), H, power, floor)
        if not bool(made.to(W.dtype).isfinite().all()):
            raise RemedyError(f"{weight.parameter} would not be finite: its orthogonal factor reads next to nothing.")
        return made

    return changed(patient, weight, new)
