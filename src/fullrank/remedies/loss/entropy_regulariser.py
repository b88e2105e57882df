"""The entropy regulariser: heads whose mean entropy strays from a share of its maximum are penalised."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fullrank.edit import Call, Edit, together
from fullrank.errors import EditError
from fullrank.remedies.attention.scores import Rows, row_blocks, scores, seen_in
from fullrank.remedies.attention.unpadded import unpadded
from fullrank.remedies.loss.collected import LATEST, Collected, added_to_loss
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["EntropyRegulariser", "entropy_regulariser", "row_entropies"]


def row_entropies(call: Call, rows: Rows = slice(None)) -> tuple[Tensor, Tensor]:
    """The entropies of some queries' attention, with their gradients, and the most that they could be.

    Args:
        call: the call, as it was made in the end.
        rows: which queries.

    Returns:
        (batch, heads, rows) −Σ_s A_ts log A_ts, in nats, and log n with n the number of visible keys; in one shape.
        Where an edit put a map in, A_ts are its weights as shares of their sum over s.
    """
    if call.replaced:
        H, seen = _entropies_of_map(call, rows), seen_in(call, rows)
    else:
        s, seen = scores(call, rows)
        lse = s.logsumexp(-1, keepdim=True)
        A = (s - lse).exp()
        H = (lse - (A * (s if seen is None else torch.where(seen, s, 0.0))).sum(-1, keepdim=True))[..., 0]
    if seen is None:
        n = torch.full_like(H, call.keys)
    else:
        n = seen.expand(*seen.shape[:-1], call.keys).sum(-1).to(H.dtype).expand(H.shape)
    return H, n.clamp(min=1).log()


def _entropies_of_map(call: Call, rows: Rows) -> Tensor:
    assert call.weights is not None
    A = call.weights[..., rows, :]
    A = A.to(torch.promote_types(A.dtype, torch.float32)).abs()
    A = A / A.sum(-1, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    given = A > 0
    return -torch.where(given, A * torch.where(given, A, 1.0).log(), 0.0).sum(-1)


class EntropyRegulariser(Collected):
    """λ · mean over layers and heads of δ² 1(|δ| > γ L), δ = E − θ L; E the mean entropy of the queries, L of log n.

    Args:
        weight: λ.
        margin: γ.
        theta: θ at first.
        heads: query heads of each call, by its key.
        learnable: whether θ is a parameter, one for each head.
        rows: how many queries of a call are looked at, at even distances; None for all.
    """

    def __init__(
        self,
        weight: float,
        *,
        margin: float,
        theta: float,
        heads: dict[Hashable, int],
        learnable: bool,
        rows: int | None,
    ) -> None:
        super().__init__(weight)
        self.margin, self.rows = margin, rows
        self.start = theta
        self.places: dict[Hashable, tuple[int, int]] = {}
        first = 0
        for key, number in heads.items():
            self.places[key] = (first, first + number)
            first += number
        if learnable:
            self.theta = nn.Parameter(torch.full((first,), theta))

    def term(self, key: Hashable, *made: Any) -> Tensor:
        """The mean over the heads of one call."""
        E, L = self.means(made[0])
        theta: float | Tensor = self.start
        if "theta" in self._parameters:
            first, end = self.places[key]
            theta = self.theta[first:end].to(E.dtype)
        delta = E - theta * L
        return torch.where(delta.abs() > self.margin * L, delta.square(), 0.0).mean()

    def means(self, call: Call) -> tuple[Tensor, Tensor]:
        """E and L of each head, over real queries that see more than one key; (heads,) each."""
        blocks: list[Rows] = list(row_blocks(call))
        if self.rows is not None and self.rows < call.queries:
            device = call.value.device
            blocks = [torch.linspace(call.queries - 1, 0, self.rows, device=device).round().long()]
        real = unpadded(call)
        if len(blocks) == 1:
            sums = _sums(call, blocks[0], real)
        else:
            parts = [
                checkpoint(_sums, call, rows, real, use_reentrant=False, preserve_rng_state=False) for rows in blocks
            ]
            sums = torch.stack(parts).sum(0)
        H, L, number = sums.unbind()
        return H / number.clamp(min=1), L / number.clamp(min=1)


def _sums(call: Call, rows: Rows, real: Tensor | None) -> Tensor:
    """(3, heads): sums of entropies, of log n, and how many queries they are of."""
    H, L = row_entropies(call, rows)
    counted = (L > 0).to(H.dtype)
    if real is not None:
        counted = counted * real[:, None, rows]
    return torch.stack([(one * counted).sum((0, 2)) for one in (H, L, torch.ones_like(H))])


class _Collect:
    """Looks at the calls of attention modules as all remedies made them, and leaves their output as it is."""

    def __init__(self, penalty: EntropyRegulariser) -> None:
        self.penalty = penalty

    def __call__(self, call: Call, output: Tensor) -> Tensor:
        if call.attend is not None:
            raise EditError(
                f"entropy-regulariser needs the map of a softmax, and that of {call.place.path} is made by another "
                "remedy; use attn_implementation='eager', or one of the two."
            )
        self.penalty.put(_key(call.place), call)
        return output


def _key(place: Any) -> Hashable:
    return place.stack, place.layer, place.part


@remedy(
    "entropy-regulariser",
    "heads whose entropy strays from a share of its maximum are penalised in the loss",
    addresses=("entropy-collapse", "averaging-heads"),
    acts_on="loss",
    exactness="identity-now",
    formula="loss + λ · mean over layers and heads of δ² 1(|δ| > γ L), δ_h = E_h − θ_h L; E_h mean entropy, L mean "
    "log n",
    papers=("Jha, Reagen: Entropy-Guided Attention for Private LLMs, arXiv 2501.03489, Algorithm 1",),
    keys=("entropy",),
    parameters=(
        Parameter("weight", "λ, of means (the released sums over batch and queries need λ/(B·T))", 0.164, low=0.0),
        Parameter("margin", "γ, within which nothing is penalised, as a share of log n", 0.2, low=0.0, high=1.0),
        Parameter("theta", "θ, the share of log n that is wanted", 0.5, low=0.0, high=1.0),
        Parameter("learnable", "whether θ is a parameter for each head", False, kind="switch"),
        Parameter(
            "rows",
            "how many queries of each call are looked at; none for all",
            None,
            kind="integer",
            low=1,
            optional=True,
        ),
    ),
    limits=(
        "The function is unchanged; the objective is another one: it acts in training.",
        "Against the released code: means in place of sums, the threshold on the mean of a head and not on each "
        "query, one "
        "θ for each head of each layer, and log n of the visible keys in place of log T.",
        "The penalty jumps at the margin, as the paper's does.",
        "With accumulated gradients that are summed and not averaged, divide the weight by the number of steps.",
        "Checkpointing with use_reentrant=True runs forwards without gradients: nothing is collected there.",
        "Models that return no loss: add `repair.penalty()` to yours.",
        LATEST,
        "The map is the one that all remedies make of it, also of those applied later; one that a remedy puts in the "
        "place of the softmax counts by shares of its rows' sums. A sink takes no part: it leaves those shares as they "
        "are. A kernel that another remedy replaces shows no map and is refused.",
    ),
    cost=(
        "in training a second pass over the scores, T² in plain operations beside the kernel, or rows·T; by blocks "
        "that are "
        "computed again in the backward pass beyond 32 million; fused kernels stay"
    ),
    structural=True,
    only_weights={"learnable": False},
)
def entropy_regulariser(
    patient: Patient,
    *,
    weight: float = 0.164,
    margin: float = 0.2,
    theta: float = 0.5,
    learnable: bool = False,
    rows: int | None = None,
) -> Edit:
    """Collect the entropies of every self-attention and penalise them."""
    heads = {_key(call.place): call.heads for site in patient.self_attention for call in site.calls}
    penalty = EntropyRegulariser(weight, margin=margin, theta=theta, heads=heads, learnable=learnable, rows=rows)

    def make(site: Site) -> _Collect:
        return _Collect(penalty)

    def edits() -> Iterator[Edit]:
        yield patient.rewrite("entropy-regulariser", after=make)
        yield added_to_loss(patient, "entropy-regulariser", penalty)

    edit = together(edits())
    edit.what = "penalise the entropy of attention"
    return edit
