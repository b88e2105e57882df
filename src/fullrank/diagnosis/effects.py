"""The effect of an intervention: the model run without and with it, on the same documents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol, Self

import torch
from torch import Tensor, nn

from fullrank.capture import Anatomy, undisturbed
from fullrank.diagnosis.distributions import MEMORY, Distributions
from fullrank.diagnosis.final_states import States
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.interventions import apply
from fullrank.diagnosis.merging import Merging
from fullrank.diagnosis.outcomes import Losses, Measured, Unmeasured, outcome_of
from fullrank.edit import Edit, replace_stream
from fullrank.errors import EditError
from fullrank.report.verdict import Effect, Outcome

__all__ = ["Batch", "Trials", "paired"]

_LEVEL = 0.95
_WORDS: Final = {"loss": "loss", "distribution": "output distribution", "state": "final state"}


class Batch(Protocol):
    """What a model is run on: sequences that can, or cannot, be run one by one."""

    @property
    def real(self) -> Tensor | Mapping[str, Tensor] | None:
        """(sequences, tokens), which tokens are real, by stack where the stacks differ; None when all are."""
        ...

    @property
    def documents(self) -> object | None:
        """Not None where rows hold several documents each."""
        ...

    @property
    def sequences(self) -> int:
        """How many there are."""
        ...

    @property
    def divisible(self) -> bool:
        """Whether they can be run one by one."""
        ...

    def part(self, start: int, stop: int) -> Self:
        """Some of the sequences."""
        ...

    def run(self, model: nn.Module) -> Any:
        """Call the model."""
        ...


class Trials:
    """Runs interventions on a model and says what each changes: implements `fullrank.diagnosis.Tester`.

    The unchanged model is run once, at the start, and decides by what effects are measured. An effect is paired: each
    document with itself. Every run begins with the same random state, in evaluation mode and without gradients; nothing
    about the model is different afterwards, whatever happened in between. Cost: one forward of all batches for each
    intervention, two for `merge-heads`, whose factors are measured first (see `apply` for others that cost more), and
    the memory of what the unchanged model returned.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        batches: what it is run on; two documents at least.
        batch_statistics: batch norms normalise with the statistics of each batch, as in training.
        memory: bytes of unchanged logits that are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        batches: Sequence[Batch],
        *,
        batch_statistics: bool = False,
        memory: int = MEMORY,
    ) -> None:
        self._model, self._anatomy = model, anatomy
        self._undisturbed = partial(undisturbed, model, batch_statistics=batch_statistics)
        self._known: dict[Intervention, Effect | str] = {}
        self._reached: dict[str, bool] = {}
        self._refused = ""
        self._measured = _measured("state", anatomy, memory // len(batches))
        self._draws, self._runs = _Draws(model), list(batches)
        try:
            with self._undisturbed():
                first, sequences = self._unchanged(batches[0])
                apart = _apart(batches) if sequences == batches[0].sequences else list(batches)
                outcome = outcome_of(first, anatomy, apart=len(apart) > 1)
                self._measured = _measured(outcome, anatomy, memory // len(batches))
                self._runs = apart if self._measured.apart else list(batches)
                self._see((first, sequences) if self._runs[0] is batches[0] else None)
        except Exception as reason:  # noqa: BLE001 - the report must not be lost with its test
            self._refused = f"the unchanged model could not be run again: {_first_line(reason)}."

    @property
    def outcome(self) -> Outcome:
        """By what effects are measured."""
        return self._measured.name

    @property
    def refused(self) -> str:
        """Why nothing can be measured on these batches; empty where something can."""
        return self._refused

    @property
    def words(self) -> str:
        """By what effects are measured, in words, with the number of documents; empty where nothing can be measured."""
        return "" if self._refused else self._measured.words

    def effect(self, intervention: Intervention) -> Effect | str:
        """What an intervention changes: mean over documents and a 95 % interval of Student's t.

        Args:
            intervention: what to do.

        Returns:
            The effect, the same for the same intervention, infinite where the changed model's output is not finite; or
            a sentence why there is none: what cannot be done on this model, fewer than two documents.
        """
        if self._refused:
            return self._refused
        if intervention not in self._known:
            self._known[intervention] = self._tried(intervention)
        return self._known[intervention]

    def _unchanged(self, run: Batch) -> tuple[Any, int]:
        """What the model returns, and how many sequences it was given, whatever axis they are on."""
        stack, seen = self._anatomy.stacks[-1], [run.sequences]
        if not stack.layout.tokens_first:
            return self._draws.again(run.run, self._model), run.sequences

        def look(X: Tensor) -> Tensor:
            seen.append(X.shape[0])
            return X

        with replace_stream(self._model, self._anatomy, look, stack=stack.name, layer=0):
            return self._draws.again(run.run, self._model), seen[-1]

    def _see(self, first: tuple[Any, int] | None) -> None:
        """Take in the unchanged runs; `first` is what came of the first of them, where that is known."""
        try:
            for index, run in enumerate(self._runs):
                output, sequences = first if index == 0 and first is not None else self._unchanged(run)
                self._measured.see(output, sequences, run.real)
        except Unmeasured as reason:
            self._refused = str(reason)
            return
        if self._measured.documents < 2:
            self._refused = "one document: at least two are needed to say how sure an effect is."

    def _tried(self, intervention: Intervention) -> Effect | str:
        if intervention.kind == "merge-heads" and not intervention.factors:
            factors = self._factors(intervention)
            if isinstance(factors, str):
                return factors
            intervention = dataclasses.replace(intervention, factors=factors)

        def put(run: Batch) -> Edit | str:
            packed = run.documents is not None
            return apply(self._model, self._anatomy, intervention, real=run.real, packed=packed)

        values = self._changes(put)
        if isinstance(values, str):
            return values
        if not any(values) and not self._reaches(intervention.stack):
            return f"the model's {_WORDS[self.outcome]} does not depend on the stack {intervention.stack}."
        # an output that is not finite is the largest effect there is
        change, low, high = paired(values) if all(map(math.isfinite, values)) else (math.inf,) * 3
        return Effect(
            intervention=intervention.words,
            outcome=self.outcome,
            change=change,
            low=low,
            high=high,
            n=len(values),
            baseline=self._measured.baseline,
        )

    def _changes(self, put: Callable[[Batch], Edit | str]) -> list[float] | str:
        """One number for each document, with an edit in force; or why there are none."""
        changes: list[Tensor] = []

        def measure(index: int, output: Any) -> None:
            changes.append(self._measured.changes(index, output))

        return self._each(put, measure) or torch.cat(changes).tolist()

    def _factors(self, intervention: Intervention) -> tuple[float, ...] | str:
        """By what heads that stay are multiplied, over all documents; or why that is not known."""
        merging = Merging(self._model, self._anatomy, intervention)
        refused = self._each(lambda run: merging.watch(run.real), lambda index, output: None)
        try:
            return refused or merging.factors()
        except EditError as reason:
            return str(reason)

    def _each(self, put: Callable[[Batch], Edit | str], take: Callable[[int, Any], None]) -> str:
        """Run every document with an edit in force, and hand on what the model returns; why not, or empty."""
        try:
            with self._undisturbed():
                for index, run in enumerate(self._runs):
                    edit = put(run)
                    if isinstance(edit, str):
                        return edit
                    with edit:
                        output = self._draws.again(run.run, self._model)
                    take(index, output)
        except (EditError, Unmeasured) as reason:
            return str(reason)
        except Exception as reason:  # noqa: BLE001 - of code that has never seen such a state, whatever it raises
            return f"the changed model failed: {_first_line(reason)}."
        return ""

    def _reaches(self, stack: str) -> bool:
        """Whether anything changes where the last state of a stack is put to zero: else no effect means nothing."""
        if stack not in self._reached:
            found = next(one for one in self._anatomy.stacks if one.name == stack)

            def put(run: Batch) -> Edit:
                return replace_stream(self._model, self._anatomy, 0.0, stack=stack, layer=len(found.paths))

            values = self._changes(put)
            self._reached[stack] = isinstance(values, str) or any(values)
        return self._reached[stack]


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval, x̄ ± t s / √n.

    Args:
        differences: at least two.

    Returns:
        Mean, lower and upper end; all the same where the differences are.
    """
    from scipy.stats import t

    n = len(differences)
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (n - 1))
    half = float(t.ppf((1 + _LEVEL) / 2, n - 1)) * spread / math.sqrt(n)
    return mean, mean - half, mean + half


def _measured(outcome: Outcome, anatomy: Anatomy, memory: int) -> Measured:
    if outcome == "loss":
        return Losses()
    return Distributions(anatomy, memory=memory) if outcome == "distribution" else States(anatomy)


def _apart(batches: Sequence[Batch]) -> list[Batch]:
    """The sequences one by one, where they can be."""
    runs: list[Batch] = []
    for batch in batches:
        single = batch.divisible and batch.sequences > 1
        runs += [batch.part(i, i + 1) for i in range(batch.sequences)] if single else [batch]
    return runs


class _Draws:
    """The random state at the start, for every run: what a model draws is the same in all of them."""

    def __init__(self, model: nn.Module) -> None:
        self._put_back: list[Callable[[], None]] = [partial(torch.set_rng_state, torch.get_rng_state())]
        for device in {tensor.device for tensor in (*model.parameters(), *model.buffers())}:
            module = getattr(torch, device.type, None)
            if device.type not in ("cpu", "meta") and hasattr(module, "get_rng_state"):
                where = () if device.type == "mps" else (device,)
                state = module.get_rng_state(*where)  # type: ignore[union-attr]
                self._put_back.append(partial(module.set_rng_state, state, *where))  # type: ignore[union-attr]

    def again(self, run: Callable[[nn.Module], Any], model: nn.Module) -> Any:
        """Run a model from that state."""
        for put_back in self._put_back:
            put_back()
        return run(model)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
