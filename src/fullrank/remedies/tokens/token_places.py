"""What stands at the attention and the residual sums of a model whose tokens are reduced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fullrank.edit import Call
from fullrank.remedies.tokens.patch_grid import PatchGrid
from fullrank.remedies.tokens.token_schedule import Reducing
from fullrank.remedies.tokens.token_scores import attention_of_class, attention_received, keys_of_tokens
from fullrank.remedies.tokens.token_sets import Standing, fused, merged, pooled, restored, windows_of

__all__ = ["Attending", "Plan", "Reduce", "Restore"]


@dataclass(eq=False)
class Plan:
    """What all places of one model share: what is done where, and in a forward what has been done.

    Attributes:
        steps: by block call, in order.
        protected: tokens that come first and stay.
        grid: of patches; None where no window needs it.
        weighted: see `update`.
        fusion: see `fusion`.
        compensate: whether log sizes are added to logits.
        scores: of the tokens of a block, from its attention to its residual sum.
        standing: of the tokens after each block that reduces, in the forward that runs or ran last.
    """

    steps: Mapping[int, Reducing]
    protected: int
    grid: PatchGrid | None
    weighted: bool
    fusion: str
    compensate: bool
    scores: dict[int, Tensor] = field(default_factory=dict)
    standing: dict[int, Standing] = field(default_factory=dict)

    def before(self, layer: int) -> int | None:
        """The last block before this one that reduces."""
        last = None
        for one in self.steps:  # in order; a compiler follows it
            last = one if one < layer else last
        return last


class Attending(nn.Module):
    """Before the attention of a block: sizes on logits, frequencies weighed, tokens scored.

    Args:
        plan: of the model.
        heads: of values, where they are to be weighed.
    """

    def __init__(self, plan: Plan, heads: int | None) -> None:
        super().__init__()
        self._plan = plan
        if heads is not None:
            self.omega_high = nn.Parameter(torch.zeros(heads))
            self.omega_pooled = nn.Parameter(torch.zeros(heads))

    def forward(self, call: Call) -> Call:
        """The call with fewer tokens, as it is to be made."""
        plan, layer = self._plan, call.place.layer
        last = plan.before(layer)
        if last is not None and plan.compensate:
            call = _with_sizes(call, plan.standing[last].sizes)
        if layer in plan.steps:
            plan.scores[layer] = _SCORES[plan.steps[layer].method](call)
        if last is None or "omega_high" not in self._parameters:
            return call
        return call.change(value=self._weighed(call.value, plan.standing[last].pooled))

    def _weighed(self, V: Tensor, number: int) -> Tensor:
        """A · this = (J + (1 + ω₁)(A − J)) V over patches + (1 + ω₂) A V over pooled tokens, as rows of A add to 1."""
        high, low = (omega.to(V.dtype)[:, None, None] for omega in (self.omega_high, self.omega_pooled))
        count = V.shape[-2]
        factors = torch.cat([(1 + high).expand(-1, count - number, 1), (1 + low).expand(-1, number, 1)], 1)
        mean = high * V[..., : count - number, :].sum(-2, keepdim=True) / count
        return torch.addcmul(-mean, V, factors)


class Reduce:
    """In place of the sum of the stream and attention."""

    def __init__(self, plan: Plan, layer: int) -> None:
        self._plan, self._layer = plan, layer

    def __call__(self, X: Tensor, F: Tensor) -> Tensor:
        """Their sum, of fewer tokens."""
        plan, step = self._plan, self._plan.steps[self._layer]
        last, p = plan.before(self._layer), plan.protected
        X = X + F
        standing = Standing.of(X, p) if last is None else plan.standing[last]
        score = plan.scores.pop(self._layer)
        kept = step.kept(X.shape[1], p, standing.pooled)
        if step.left(X.shape[1], p, standing.pooled) == X.shape[1]:
            new = X
        elif step.method == "merge":
            new, standing = merged(X, standing, score, protected=p, number=X.shape[1] - p - kept)
        elif step.method == "prune":
            new, standing = fused(X, standing, score, protected=p, kept=kept, fusion=plan.fusion)
        else:
            new, standing = self._pooled(X, standing, score, kept)
        plan.standing[self._layer] = standing
        return new

    def _pooled(self, X: Tensor, standing: Standing, score: Tensor, kept: int) -> tuple[Tensor, Standing]:
        plan, step = self._plan, self._plan.steps[self._layer]
        wide = round(step.pooled**0.5)
        first = standing.source.shape[1] - plan.protected
        windows = torch.zeros(first, dtype=torch.long, device=X.device)
        if wide > 1:
            assert plan.grid is not None
            windows = windows_of(*plan.grid.of(first), wide, X.device)
        earlier = round(standing.pooled**0.5)
        return pooled(
            X,
            standing,
            score,
            protected=plan.protected,
            kept=kept,
            windows=windows,
            old=windows_of(earlier, earlier, wide, X.device) if earlier else windows[:0],
            number=step.pooled,
            weighted=plan.weighted,
        )


class Restore:
    """In place of the sum of the stream and what the last block adds last."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, X: Tensor, F: Tensor) -> Tensor:
        """Their sum, of all tokens again."""
        return restored(X + F, self._plan.standing[max(self._plan.steps)])


_SCORES = {"frequency": attention_received, "merge": keys_of_tokens, "prune": attention_of_class}


def _with_sizes(call: Call, sizes: Tensor) -> Call:
    """Log sizes added to the logits of keys; a token that stands for none is not seen."""
    more = sizes.log()[:, None, None, :]  # in float32 or wider
    if call.logits is not None:
        return call.change(logits=call.logits + more.to(call.logits.dtype))
    more = more.to(call.value.dtype)
    return call.change(bias=more if call.bias is None else call.bias + more)
