"""The rank regulariser: streams whose tokens are nearly parallel are penalised."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from fullrank.capture.tap import recomputing
from fullrank.capture.wrappers import bare
from fullrank.edit import Call, Edit, replace_stream, together
from fullrank.edit.forwards import EditedForward, Enclosed
from fullrank.edit.handle import make
from fullrank.edit.packed import PackedCall
from fullrank.errors import RemedyError
from fullrank.remedies.attention.unpadded import unpadded
from fullrank.remedies.loss.collected import LATEST, Collected, added_to_loss
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
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
        self._real: dict[str, Tensor | None] = {}

    def forget(self) -> None:
        """Keep nothing of the forward before."""
        super().forget()
        self._real = {}

    def tell(self, stack: str, real: Tensor | None) -> None:
        """Which tokens of a stack are no padding in this forward.

        Args:
            stack: its name.
            real: (sequences, tokens); None where all are.
        """
        if torch.compiler.is_compiling() or not recomputing():
            self._real = {**self._real, stack: real}

    def term(self, key: Hashable, *made: Any) -> Tensor:
        """Of one stream."""
        stack, X = made
        real = self._real.get(stack)
        fits = real is not None and real.shape[0] in (1, X.shape[0]) and real.shape[1] == X.shape[1]
        return rank_loss(X, real.bool() if fits and real is not None else None, squared=self.squared)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a forward."""
        return {**super().__getstate__(), "_real": {}}


class _Collect:
    def __init__(self, penalty: RankRegulariser, stack: str, layer: int) -> None:
        self.penalty, self.stack, self.layer = penalty, stack, layer

    def __call__(self, X: Tensor) -> Tensor:
        self.penalty.put((self.stack, self.layer), self.stack, X)
        return X


class _ToldByAttention:
    """Looks at the mask of a stack's first attention."""

    def __init__(self, penalty: RankRegulariser) -> None:
        self.penalty = penalty

    def __call__(self, call: Call) -> Call:
        if not isinstance(call, PackedCall) and (call.mask is None or isinstance(call.mask, Tensor)):
            self.penalty.tell(call.place.stack, unpadded(call))
        return call


class _ToldByName:
    """Around the model: its `attention_mask`, by which models without attention are told too.

    Args:
        penalty: the penalty.
        stack: name of the only stack.
        at: the place of the argument.
    """

    what = "tell padding"

    def __init__(self, penalty: RankRegulariser, stack: str, at: int) -> None:
        self.penalty, self.stack, self.at = penalty, stack, at

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        """Run the model's forward."""
        told = kwargs.get("attention_mask", args[self.at] if self.at < len(args) else None)
        if isinstance(told, Tensor) and told.ndim == 2:
            self.penalty.tell(self.stack, told)
        return run(*args, **kwargs)


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
        "Padding is left out as the first attention of each stack is told of it: tokens that none of their sequence "
        "sees. Where that shows no mask, as state spaces do, it is the model's attention_mask, if there is one stack.",
        "Where blocks are checkpointed and several forwards come before one backward pass, their padding has to be the "
        "same: what is repeated takes that of the latest.",
        "With accumulated gradients that are summed and not averaged, divide the weight by the number of steps.",
        "Checkpointing with use_reentrant=True runs forwards without gradients: nothing is collected inside blocks "
        "there.",
        "Models that return no loss: add `repair.penalty()` to yours.",
        LATEST,
    ),
    cost=(
        "one Gram matrix per sequence and layer looked at, of the smaller of tokens and width; one look at a mask per "
        "stack; no parameters"
    ),
    structural=False,
)
def rank_regulariser(patient: Patient, *, weight: float = 0.1, layers: str = "last") -> Edit:
    """Penalise the streams of every stack."""
    penalty = RankRegulariser(weight, squared=layers == "all")
    where: list[str] = []

    def placed(edit: Edit) -> Edit:
        where.extend(edit.where)
        return edit

    def edits() -> Iterator[Edit]:
        for stack in patient.anatomy.stacks:
            depth = len(stack.paths)
            for layer in range(1, depth + 1) if layers == "all" else (depth,):
                look = _Collect(penalty, stack.name, layer)
                yield placed(replace_stream(patient.model, patient.anatomy, look, stack=stack.name, layer=layer))
        yield from _told_of_padding(patient, penalty)
        yield placed(added_to_loss(patient, "rank-regulariser", penalty))

    edit = together(edits())
    edit.where = tuple(where)
    edit.what = "penalise the rank of the stream"
    return edit


def _told_of_padding(patient: Patient, penalty: RankRegulariser) -> Iterator[Edit]:
    """What tells the penalty which tokens are real."""
    model, stacks = bare(patient.model), patient.anatomy.stacks
    names = list(inspect.signature(model.forward).parameters)
    if len(stacks) == 1 and "attention_mask" in names:
        around = _ToldByName(penalty, stacks[0].name, names.index("attention_mask"))
        yield make("tell padding", [type(model).__name__], [lambda: Enclosed(model, around)])
    first: dict[str, Site] = {}
    with contextlib.suppress(RemedyError):  # there is none, or none that can be looked at
        for site in patient.self_attention:
            if site.first.queries == site.first.keys:
                first.setdefault(site.first.place.stack, site)
    if first:
        look = _ToldByAttention(penalty)
        yield patient.rewrite("rank-regulariser", before=lambda site: look, sites=list(first.values()))
