"""What every variant of a screening is examined and trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fullrank.remedies import Asked, Repair, repaired
from fullrank.report import Report
from fullrank.spec import Subject
from fullrank.trials import Data, OwnLoss, Settings, Trial, of_batches, of_task, task_for, trial
from fullrank.verbs.batches import Call
from fullrank.verbs.examine import examine
from fullrank.verbs.passes import anatomy_of
from fullrank.verbs.ranks import Ranks

__all__ = ["Bench", "School"]


@dataclass(frozen=True)
class Bench:
    """What every variant is examined on."""

    model: nn.Module
    calls: Sequence[Call]
    batch: Any
    seed: int

    def examined(self, subject: Subject | nn.Module, *, reference: bool) -> Report:
        """A report without singular values, of one backward."""
        return examine(
            subject,
            self.batch,
            spectrum=False,
            gradients=True,
            probes=1,
            reference=reference,
            seed=self.seed,
        )

    def repaired(self, asked: Sequence[Asked]) -> Repair:
        """Remedies in force."""
        first = self.calls[0].for_survey()
        return repaired(self.model, lambda: first.run(self.model), asked)


@dataclass(frozen=True)
class School:
    """What every variant is trained on."""

    model: nn.Module
    data: Data
    steps: int
    seeds: Sequence[int]
    rates: Sequence[float]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        calls: Sequence[Call],
        steps: int,
        data: Iterable[Any] | None,
        loss: Callable[[nn.Module, Any], Any] | None,
        seeds: Sequence[int],
        rates: Sequence[float],
        size: int,
        seed: int,
    ) -> School:
        """A built-in task, or the user's batches."""
        if data is not None:
            causal = all(stack.causal for stack in anatomy_of(model, list(calls), Ranks()).stacks)
            chosen = of_batches(data, loss=loss, causal=causal, steps=steps, seeds=len(seeds))
        else:
            first = calls[0]
            chosen = of_task(task_for(model, first.kwargs or first.args, seed=seed), steps=steps, size=size)
        return cls(model, chosen, steps, tuple(seeds), tuple(rates))

    def taught(self, repair: Repair | None, settings: Settings | None = None, rate: float | None = None) -> Trial:
        """The model as it stands, trained."""
        penalised = repair is not None and not isinstance(self.data.objective, OwnLoss)  # models add it to their own
        return trial(
            self.model,
            self.data,
            steps=self.steps,
            seeds=self.seeds,
            settings=settings,
            rates=self.rates,
            rate=rate,
            extra_loss=repair.penalty if penalised and repair is not None else None,
        )
