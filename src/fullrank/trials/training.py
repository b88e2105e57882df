"""Training a lent model for some steps, and what it lost on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.errors import TrialError
from fullrank.trials.course import Course, Optimiser, Settings
from fullrank.trials.lent import lent, reseeded
from fullrank.trials.masters import Masters
from fullrank.trials.objective import LossFunction, Objective, objective_for
from fullrank.trials.readout import Readout

__all__ = ["judged", "train"]

DIVERGED = 4.0  # times the first loss, or this many nats above it where that is small


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
    started: Sequence[float] | None = None,
    causal: bool = False,
) -> Course:
    """Train a model and give it back as it was.

    The same arguments give the same course, bit for bit on one machine. Dropout and batch statistics are those of
    training. Parameters that ask for no gradient stay as they are; those of half precision are optimised as float32
    copies that are rounded into them after every step. Held-out batches are read in evaluation mode.

    Args:
        model: see `lent`.
        batches: read one a step, and again from the first where they are too few; those without a target are passed by.
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
        started: what `judged` gave for them before, so that it is not computed again.
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
    data = [batch for batch in data if objective.judges(batch)]
    if not data:
        raise TrialError("no batch has a target: their labels are all -100, or their sequences are single tokens.")
    with lent(model, seed=seed):
        return _course(model, data, objective, settings, steps, seed, extra_loss, held_out, started)


def judged(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    loss: Objective | LossFunction | None = None,
    causal: bool = False,
    seed: int = 0,
) -> tuple[float, ...]:
    """What a model loses on every sequence before anything is trained, as `Course.started` has it.

    Args:
        model: as it stands; it comes back as it was.
        batches: to be judged on.
        loss: see `train`.
        causal: see `train`.
        seed: of the global generators, should the model draw in evaluation mode.

    Returns:
        A loss for every sequence that has a target, in the order of the batches.
    """
    if not batches:
        return ()
    objective = objective_for(batches[0], loss=loss, causal=causal)
    with lent(model, seed=seed):
        _fresh(objective.readout)
        return _judge(model, objective, batches)


def _course(
    model: nn.Module,
    data: Sequence[Any],
    objective: Objective,
    settings: Settings,
    steps: int,
    seed: int,
    extra_loss: Callable[[], Tensor] | None,
    held_out: Sequence[Any],
    started: Sequence[float] | None,
) -> Course:
    readout = _fresh(objective.readout)
    parameters = [p for p in dict.fromkeys(model.parameters()) if p.requires_grad] + readout
    if not parameters:
        raise TrialError("no parameter asks for a gradient, so that there is nothing to train.")
    masters = Masters.of(parameters)
    optimiser = _optimiser(masters.held, settings)
    before = _judge(model, objective, held_out) if started is None else tuple(started)
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
            found = objective.of(model, data[step % len(data)])
            losses.append(float(found.loss.detach()))
            if not _sane(losses):
                diverged = step
                break
            total = found.loss
            if not total.requires_grad:
                raise TrialError("the loss does not depend on any parameter that asks for a gradient.")
            if settings.z_loss:
                total = total + settings.z_loss * _z(found.logits)
            if extra_loss is not None:
                total = total + extra_loss()
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            masters.take_gradients()
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(masters.held, settings.clip)
            optimiser.step()
            masters.give_values()
            seconds.append(time.perf_counter() - begun)
    model.eval()
    ended = _judge(model, objective, held_out) if diverged is None else ()
    course = Course(tuple(losses), settings, seed, ended, before, diverged, median(seconds) if seconds else math.nan)
    if diverged is None and (len(ended) != len(before) or not all(map(math.isfinite, ended))):
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


def _optimiser(parameters: Sequence[Tensor], settings: Settings) -> torch.optim.Optimizer:
    """One kernel for all parameters: of a deep network of small ones the updates were a quarter of a step."""
    devices = {p.device.type for p in parameters}
    fused = devices <= {"cpu", "cuda"} and all(p.is_floating_point() for p in parameters)
    rate = settings.learning_rate
    if settings.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, fused=fused)
    return torch.optim.AdamW(parameters, lr=rate, betas=settings.betas, eps=settings.eps, weight_decay=0.0, fused=fused)


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
