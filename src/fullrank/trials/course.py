"""How a model is trained, and how a training went."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from fullrank.errors import TrialError

__all__ = ["Course", "Optimiser", "Settings"]

Optimiser = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class Settings:
    """How a model is trained, beside what on.

    Attributes:
        learning_rate: after warm-up, constant.
        optimiser: `adamw` without weight decay, or `sgd` with momentum 0.9.
        warm_up: steps over which the rate rises linearly, or a share of all steps below 1.
        eps: Adam's ε.
        betas: Adam's β₁ and β₂.
        z_loss: weight of (log Σ exp z)², averaged over all logits.
        clip: largest norm of the gradient; None for any.
    """

    learning_rate: float = 1e-3
    optimiser: Optimiser = "adamw"
    warm_up: float = 0
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    z_loss: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise TrialError(f"learning_rate={self.learning_rate!r}; expected a positive number.")
        if self.optimiser not in ("adamw", "sgd"):
            raise TrialError(f"optimiser={self.optimiser!r} is not one of adamw, sgd.")
        if self.warm_up < 0 or self.z_loss < 0 or not self.eps >= 0:
            raise TrialError("warm_up, z_loss and eps are not negative.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TrialError(f"betas={self.betas!r}; expected two numbers from 0 to below 1.")

    def steps_of_warm_up(self, steps: int) -> float:
        """How many of so many steps the rate rises over."""
        return max(1.0, float(round(self.warm_up * steps))) if 0 < self.warm_up < 1 else self.warm_up

    def rate(self, step: int, steps: int) -> float:
        """Of a step, counted from 0."""
        rising = self.steps_of_warm_up(steps)
        return self.learning_rate * min(1.0, (step + 1) / rising) if rising >= 1 else self.learning_rate

    def as_arguments(self) -> dict[str, Any]:
        """As `train` takes them."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True)
class Course:
    """How a training went.

    Attributes:
        losses: of the batches, one a step, before the step; without penalties.
        settings: that it was made with.
        seed: of dropout and of the order.
        held_out: loss of every held-out sequence that has a target, after the last step; empty where none were given.
        started: the same before the first step.
        diverged: the step whose loss was not finite or left the start far behind; None where none was. A batch without
            a target has no loss and is no such step.
        seconds: median of a step.
    """

    losses: tuple[float, ...]
    settings: Settings
    seed: int
    held_out: tuple[float, ...] = ()
    started: tuple[float, ...] = ()
    diverged: int | None = None
    seconds: float = math.nan

    @property
    def steps(self) -> int:
        """How many were made."""
        return len(self.losses)

    @property
    def final(self) -> float:
        """Mean over the held-out sequences after the last step; of the last tenth of losses where none were held out.

        Infinite where the training diverged.
        """
        if self.diverged is not None:
            return math.inf
        if self.held_out:
            return math.fsum(self.held_out) / len(self.held_out)
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return math.fsum(last) / len(last) if last else math.nan

    @property
    def start(self) -> float:
        """Mean over the held-out sequences before the first step; the first loss where none were held out."""
        if self.started:
            return math.fsum(self.started) / len(self.started)
        return self.losses[0] if self.losses else math.nan

    def trains(self, chance: float | None = None, *, share: float = 0.95) -> bool:
        """Whether it got anywhere: it did not diverge, and lost less at the end than at the start and than by chance.

        Args:
            chance: loss of who knows nothing of the context; None where that is not known.
            share: of chance that the loss must be below.

        Returns:
            Whether it did.
        """
        limit = self.start if chance is None else min(self.start, share * chance)
        return self.diverged is None and self.final < limit
