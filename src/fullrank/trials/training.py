"""Training a lent model for some steps, and what it lost on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.errors import TrialError
from fullrank.trials.lent import lent, reseeded
from fullrank.trials.objective import LossFunction, Objective, objective_for
from fullrank.trials.readout import Readout

__all__ = ["Course", "Settings", "train"]

Optimiser = Literal["adamw", "sgd"]
DIVERGED = 4.0  # times the first loss, or this many nats above it where that is small


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
        held_out: loss of every held-out sequence after the last step; empty where none were given.
        started: the same before the first step.
        diverged: the step whose loss was not finite or left the start far behind; None where none was.
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


def train(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    optimiser: Optimiser = "adamw",
    warm_up: float = 0,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    z_loss: float = 0.0,
    clip: float | None = 1.0,
    seed: int = 0,
    loss: Objective | LossFunction | None = None,
    extra_loss: Callable[[], Tensor] | None = None,
    held_out: Sequence[Any] = (),
    causal: bool = False,
) -> Course:
    """Train a model and give it back as it was.

    The same arguments give the same course, bit for bit on one machine. Dropout and batch statistics are those of
    training. Parameters that ask for no gradient stay as they are. Held-out batches are read in evaluation mode.

    Args:
        model: see `lent`.
        batches: read one a step, and again from the first where they are too few.
        steps: how many.
        learning_rate: see `Settings`, as all to `clip`.
        optimiser: `adamw` or `sgd`.
        warm_up: steps, or a share of them.
        eps: Adam's ε.
        betas: Adam's β₁ and β₂.
        z_loss: its weight.
        clip: largest norm of the gradient.
        seed: of dropout.
        loss: an objective or a function of model and batch; by default what the batches themselves say.
        extra_loss: called after every forward, added to what is differentiated and not to what is reported.
        held_out: batches whose sequences are judged before and after.
        causal: whether batches without labels have a next token to be said.

    Returns:
        The course.

    Raises:
        TrialError: where there is no loss, nothing to train, or no batch.
    """
    settings = Settings(learning_rate, optimiser, warm_up, eps, betas, z_loss, clip)
    if steps < 1:
        raise TrialError(f"steps={steps}; at least one is needed.")
    data = _first(batches, steps)
    objective = objective_for(data[0], loss=loss, causal=causal)
    with lent(model, seed=seed):
        return _course(model, data, objective, settings, steps, seed, extra_loss, held_out)


def _course(
    model: nn.Module,
    data: Sequence[Any],
    objective: Objective,
    settings: Settings,
    steps: int,
    seed: int,
    extra_loss: Callable[[], Tensor] | None,
    held_out: Sequence[Any],
) -> Course:
    readout = _fresh(objective.readout)
    parameters = [p for p in dict.fromkeys(model.parameters()) if p.requires_grad] + readout
    if not parameters:
        raise TrialError("no parameter asks for a gradient, so that there is nothing to train.")
    optimiser = _optimiser(parameters, settings)
    started = _judge(model, objective, held_out)
    losses: list[float] = []
    seconds: list[float] = []
    diverged = None
    model.train()
    reseeded(model, seed)
    with torch.enable_grad():
        for step in range(steps):
            begun = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = settings.rate(step, steps)
            judged = objective.of(model, data[step % len(data)])
            losses.append(float(judged.loss.detach()))
            if not _sane(losses):
                diverged = step
                break
            total = judged.loss
            if not total.requires_grad:
                raise TrialError("the loss does not depend on any parameter that asks for a gradient.")
            if settings.z_loss:
                total = total + settings.z_loss * _z(judged.logits)
            if extra_loss is not None:
                total = total + extra_loss()
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimiser.step()
            seconds.append(time.perf_counter() - begun)
    model.eval()
    ended = _judge(model, objective, held_out) if diverged is None else ()
    course = Course(tuple(losses), settings, seed, ended, started, diverged, median(seconds) if seconds else math.nan)
    if ended and not all(map(math.isfinite, ended)):
        return replace(course, held_out=(), diverged=steps)
    return course


def _first(batches: Iterable[Any], steps: int) -> list[Any]:
    data: list[Any] = []
    for batch in batches:
        data.append(batch)
        if len(data) == steps:
            break
    if not data:
        raise TrialError("batches is empty: there is nothing to train on.")
    return data


def _fresh(readout: nn.Module | None) -> list[nn.Parameter]:
    """The readout's parameters, as every variant is given them: the objective draws them from its own seed."""
    if readout is None:
        return []
    if isinstance(readout, Readout):
        readout.draw()
    return list(readout.parameters())


def _optimiser(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=0.9)
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, weight_decay=0.0
    )


def _judge(model: nn.Module, objective: Objective, held_out: Sequence[Any]) -> tuple[float, ...]:
    with torch.no_grad():
        found: list[float] = []
        for batch in held_out:
            found += objective.each(model, batch).tolist()
    return tuple(found)


def _sane(losses: Sequence[float]) -> bool:
    first, last = losses[0], losses[-1]
    return math.isfinite(last) and last <= max(DIVERGED * first, first + DIVERGED)


def _z(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise TrialError("z_loss needs logits, and the loss of these batches is not taken of any that are known.")
    return logits.float().logsumexp(-1).square().mean()
