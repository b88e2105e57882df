"""σReparam: weights divided by their spectral norm and multiplied by a number that is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fullrank.capture.weights import Runs, Weight, indices
from fullrank.edit import Edit, reparametrize, together
from fullrank.edit.places import module_at
from fullrank.errors import RemedyError
from fullrank.remedies.covering import notes_on_rest
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import check_weight

__all__ = ["SigmaReparam", "sigma_reparam"]

_ROLES = {"attention": ("q", "k", "v", "o"), "mlp": ("up", "gate", "down")}
_ROLES["all"] = _ROLES["attention"] + _ROLES["mlp"]
_STEPS = 1000  # of power iteration at the start, at most: γ is uᵀVv, so that W = V also where this is not quite σ


class SigmaReparam(nn.Module):
    """W = (γ/σ(V)) V for each part of a parameter, σ = uᵀVv by power iteration.

    One step for each use of the weight in training, none in evaluation; u and v are constants to the gradient, which
    goes through uᵀVv.

    Args:
        V: the parameter as it is; W = V at first.
        order: its axes as (experts,) rows, columns.
        experts: whether the first of them counts experts, each a matrix of its own.
        rows: how many axes make the rows.
        parts: rows of each part with a spectral norm of its own; rows in none of them stay as they are.
        generator: of the first u.
    """

    member: Tensor
    u: Tensor
    v: Tensor
    unit: Tensor

    def __init__(
        self,
        V: Tensor,
        *,
        order: Sequence[int],
        experts: bool,
        rows: int,
        parts: Sequence[Sequence[int]],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.order, self.experts, self.row_axes = tuple(order), experts, rows
        M = self._matrices(V.detach())
        member = torch.zeros(len(parts), M.shape[1], dtype=M.dtype)
        for part, numbers in enumerate(parts):
            member[part, list(numbers)] = 1
        self.register_buffer("member", member.to(M.device), persistent=False)
        self.register_buffer("u", (torch.randn(M.shape[:2], generator=generator).to(M) * self.member.sum(0)))
        self.register_buffer("v", M.new_zeros(M.shape[0], len(parts), M.shape[2]))
        sigma = self._settle(M)
        if not bool((sigma > 0).all()):
            raise RemedyError("its spectral norm is 0.")
        self.gamma = nn.Parameter(sigma.to(V.dtype))
        # what rounding took from γ in half precision, so that W = V at first
        self.register_buffer("unit", sigma / self.gamma.detach().to(sigma.dtype))

    def forward(self, V: Tensor) -> Tensor:
        """W, in the shape and type of V."""
        with torch.autocast(V.device.type, enabled=False):
            M = self._matrices(V)
            if self.training:
                with torch.no_grad():
                    u, v = self._step(M, self.u.to(M.dtype))
                    self.u.copy_(u)
                    self.v.copy_(v)
            u, v = self.u.to(M.dtype).clone(), self.v.to(M.dtype).clone()  # a weight may be used again before backward
            member = self.member.to(M.dtype)
            sigma = self._sigma(M, u, v, member)
            ratio = self.gamma.to(M.dtype) * self.unit.to(M.dtype) / sigma
            factor = ratio @ member + (1 - member.sum(0))
            W = (M * factor[..., None]).to(V.dtype)
            shape = [V.shape[axis] for axis in self.order]
            return W.reshape(shape).permute([self.order.index(axis) for axis in range(V.ndim)])

    def right_inverse(self, V: Tensor) -> Tensor:
        """The parameter stays what it is."""
        return V

    def _matrices(self, V: Tensor) -> Tensor:
        """(experts, rows, columns) in float32 or wider."""
        M = V.permute(self.order)
        first = int(self.experts)
        experts = M.shape[:first].numel()
        rows = M.shape[first : first + self.row_axes].numel()
        return M.reshape(experts, rows, -1).to(torch.promote_types(V.dtype, torch.float32))

    def _sigma(self, M: Tensor, u: Tensor, v: Tensor, member: Tensor) -> Tensor:
        """(experts, parts) uᵀMv."""
        seen = ((M @ v.mT) * member.mT).sum(-1)
        return (u * seen) @ member.mT

    def _step(self, M: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        member = self.member.to(M.dtype)
        v = nn.functional.normalize((member * u[:, None, :]) @ M, dim=-1)
        u = ((M @ v.mT) * member.mT).sum(-1)
        norm = (u.square() @ member.mT).sqrt().clamp(min=1e-30)
        return u * ((1 / norm) @ member), v

    @torch.no_grad()
    def _settle(self, M: Tensor) -> Tensor:
        before = torch.zeros(1, dtype=M.dtype, device=M.device)
        enough = 16 * torch.finfo(M.dtype).eps
        sigma = before
        for _ in range(_STEPS):
            u, v = self._step(M, self.u)
            self.u.copy_(u)
            self.v.copy_(v)
            sigma = self._sigma(M, self.u, self.v, self.member)
            if bool(((sigma - before).abs() <= enough * sigma).all()):
                break
            before = sigma
        return sigma


@remedy(
    "sigma-reparam",
    "weights over their spectral norm, times a number that is learnt",
    addresses=("entropy-collapse", "vanishing-or-exploding"),
    acts_on="weights",
    exactness="identity-now",
    formula="W ← (γ/σ(V))·V; σ(V) = uᵀVv, one step of power iteration per use in training; γ = σ(V) at first",
    papers=("Zhai et al., ICML 2023, arXiv 2303.06296",),
    keys=("entropy",),
    parameters=(
        Parameter("roles", "which weights of the blocks", "all", kind="choice", choices=("all", "attention", "mlp")),
        Parameter(
            "per",
            "one spectral norm for a whole parameter, as linear maps of several roles are in the paper, or for each "
            "role",
            "parameter",
            kind="choice",
            choices=("parameter", "role"),
        ),
    ),
    limits=(
        "Bounds what scores can grow to only as far as γ is small: weight decay has to act on γ too.",
        "Maps of patches, embeddings and the head stay as they are; the paper takes the patches along.",
        "A step of power iteration is taken at each use: with activation checkpointing the repeated forward is one "
        "step further than the first.",
        "After training, undoing writes W into the weight, so that the model without it computes the same.",
        "Several processes keep u and v of their own (DDP broadcasts buffers by default).",
    ),
    cost="two products of the weight with a vector per use, and a copy of the weight in training; one parameter per "
    "matrix; fused kernels stay",
)
def sigma_reparam(patient: Patient, *, roles: str = "all", per: str = "parameter") -> Edit:
    """Put σReparam before the weights of the blocks."""
    of_parameter: dict[str, list[Weight]] = {}
    for _, layer, weight in patient.weights(*_ROLES[roles]):
        check_weight(patient, layer, weight)
        parts = of_parameter.setdefault(weight.parameter, [])
        if weight not in parts:
            parts.append(weight)
    rest = notes_on_rest(patient, _ROLES[roles], [weight for parts in of_parameter.values() for weight in parts])
    generator = torch.Generator().manual_seed(0)

    def edits() -> Iterator[Edit]:
        for name, weights in of_parameter.items():
            path, _, last = name.rpartition(".")
            V = getattr(module_at(patient.model, path), last)
            try:
                yield reparametrize(patient.model, name, _function(V, weights, per, generator))
            except RemedyError as reason:
                raise RemedyError(f"{name} cannot be reparametrised: {reason}") from None

    edit = together(edits())
    if not edit.in_force:
        raise RemedyError(f"no weights were found in the blocks of this {type(patient.model).__name__}.")
    edit.notes += rest
    return edit


def _function(V: Tensor, weights: Sequence[Weight], per: str, generator: torch.Generator) -> SigmaReparam:
    one = weights[0]
    axes = (*one.out_axes, *one.in_axes)
    experts = [axis for axis in range(V.ndim) if axis not in axes]
    rows = torch.Size(V.shape[axis] for axis in one.out_axes).numel()
    if per == "parameter":
        parts = [list(range(rows))]
    else:
        if any(weight.columns is not None for weight in weights):
            raise RemedyError("roles share its columns, which have no norm of their own here; use per=parameter.")
        chosen: list[Runs | None] = list(dict.fromkeys(weight.rows for weight in weights))
        parts = [list(range(rows)) if numbers is None else indices(numbers) for numbers in chosen]
    function = SigmaReparam(
        V, order=(*experts, *axes), experts=bool(experts), rows=len(one.out_axes), parts=parts, generator=generator
    )
    return function.train(False)
