"""The rank regulariser: streams whose tokens are nearly parallel are penalised."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fullrank.edit import Edit, replace_stream, together
from fullrank.remedies.loss.collected import Collected, added_to_loss
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy

__all__ = ["RankRegulariser", "rank_loss", "rank_regulariser"]


def rank_loss(X: Tensor, real: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """‖G‖_F/Tr(G) of the Gram matrix G = X Xᵀ of each sequence's tokens, in its mean over sequences.

    It is r^{-1/2} with r = Tr(G)²/‖G‖²_F the participation ratio: 1 where all tokens are parallel, and no less than
    1/√min(T, d). Computed by the smaller of T×T and d×d.

    Args:
        X: (sequences, tokens, d).
        real: (sequences, tokens), which are no padding; None for all.
        squared: Tr(G²)/Tr(G)² instead.

    Returns:
        A scalar in float32 or wider.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    if real is not None:
        X = X * real[..., None].to(X.dtype)
    trace = X.square().sum((1, 2)).clamp(min=torch.finfo(X.dtype).tiny)
    X = X / trace.sqrt()[:, None, None]
    G = X @ X.mT if X.shape[1] <= X.shape[2] else X.mT @ X
    ratio = G.square().sum((1, 2))
    return (ratio if squared else ratio.clamp(min=torch.finfo(X.dtype).tiny).sqrt()).mean()


class RankRegulariser(Collected):
    """λ times the mean of `rank_loss` over the streams that are looked at.

    Args:
        weight: λ.
        squared: whether Tr(G²)/Tr(G)² is taken.
    """

    def __init__(self, weight: float, *, squared: bool) -> None:
        super().__init__(weight)
        self.squared = squared

    def term(self, key: Hashable, *made: Any) -> Tensor:
        """Of one stream."""
        (X,) = made
        return rank_loss(X, self.real(*X.shape[:2]), squared=self.squared)


class _Collect:
    def __init__(self, penalty: RankRegulariser, key: Hashable) -> None:
        self.penalty, self.key = penalty, key

    def __call__(self, X: Tensor) -> Tensor:
        self.penalty.put(self.key, X)
        return X


@remedy(
    "rank-regulariser",
    "streams whose tokens are nearly parallel are penalised in the loss",
    addresses=("rank-collapse-depth", "dead-depth"),
    acts_on="loss",
    exactness="identity-now",
    formula="loss + λ·‖G‖_F/Tr(G), G = X_L X_Lᵀ over the tokens of a sequence; all: λ · mean over layers of "
    "Tr(G²)/Tr(G)²",
    papers=(
        "Daneshmand, Kohler, Bach, Hofmann, Lucchi: Batch normalization provably avoids rank collapse, NeurIPS 2020, "
        "arXiv 2003.01652",
    ),
    keys=("batchnorm",),
    parameters=(
        Parameter("weight", "λ", 0.1, low=0.0),
        Parameter(
            "layers",
            "the last hidden layer, ‖G‖_F/Tr(G), or all, Tr(G²)/Tr(G)²",
            "last",
            kind="choice",
            choices=("last", "all"),
        ),
    ),
    limits=(
        "The function is unchanged; the objective is another one: it acts in training.",
        "The authors minimise it alone, before training, over the samples of a batch; here it stands beside the "
        "loss, over "
        "the tokens of each sequence. The weight is no value of theirs.",
        "Padding is left out where the model is called with attention_mask=.",
        "With accumulated gradients that are summed and not averaged, divide the weight by the number of steps.",
        "Checkpointing with use_reentrant=True runs forwards without gradients: nothing is collected inside blocks "
        "there.",
        "Models that return no loss: add `repair.penalty()` to yours.",
    ),
    cost="one Gram matrix per sequence and layer looked at, of the smaller of tokens and width; no parameters",
    structural=False,
)
def rank_regulariser(patient: Patient, *, weight: float = 0.1, layers: str = "last") -> Edit:
    """Penalise the streams of every stack."""
    penalty = RankRegulariser(weight, squared=layers == "all")
    edits: list[Edit] = []
    try:
        for stack in patient.anatomy.stacks:
            depth = len(stack.paths)
            for layer in range(1, depth + 1) if layers == "all" else (depth,):
                look = _Collect(penalty, (stack.name, layer))
                edits.append(replace_stream(patient.model, patient.anatomy, look, stack=stack.name, layer=layer))
        edits.append(added_to_loss(patient, "rank-regulariser", penalty))
    except BaseException:
        for edit in reversed(edits):
            edit.undo()
        raise
    edit = together(edits)
    edit.what = "penalise the rank of the stream"
    return edit
