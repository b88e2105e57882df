"""examine: what happens inside this model now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from fullrank.capture import Anatomy, undisturbed
from fullrank.capture.events import Observer
from fullrank.capture.wrappers import bare
from fullrank.errors import BatchError, SpecError
from fullrank.measure import AttentionObserver, FreedMemory, HeadObserver, SpectrumObserver, StreamObserver
from fullrank.measure.budget import Budget
from fullrank.measure.chosen import ChosenHeads, Heads
from fullrank.measure.spectra import SEQUENCES
from fullrank.measure.summaries import Summaries
from fullrank.measure.weights import weight_rows
from fullrank.remedies.applying.record import named_alone
from fullrank.report import Report
from fullrank.spec import Inputs, Subject, inputs, subject_of
from fullrank.table import Table
from fullrank.verbs.about import about, kept_spectra, null_values
from fullrank.verbs.asked import checked_contexts, checked_probes, chosen_heads, held_against, longest_context
from fullrank.verbs.backwards_within import backwards_within
from fullrank.verbs.batches import Call, as_calls
from fullrank.verbs.contexts import ContextPlan
from fullrank.verbs.diagnosed import diagnosed, reference_of, require_testable
from fullrank.verbs.gradients import Backwards, gradient_observers
from fullrank.verbs.load_repaired import loaded
from fullrank.verbs.passes import Finite, Progress, anatomy_of, record, require_finite_weights, stretch
from fullrank.verbs.ranks import Ranks, ranks_of
from fullrank.verbs.statistics import statistics_notes
from fullrank.verbs.within import record_within

__all__ = ["Progress", "examine"]


def examine(
    model: nn.Module | str | Subject,
    batch: Any = None,
    *,
    mask: Tensor | None = None,
    spectrum: bool = True,
    heads: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    gradients: bool = False,
    probes: int = 4,
    weights: bool = False,
    blocks: str | None = None,
    batch_statistics: bool = False,
    reference: bool = True,
    verify: bool = False,
    target_dtypes: Sequence[str] = (),
    epsilon: float | None = None,
    seed: int = 0,
    memory: str | int | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure what becomes of the signal in a model: over depth, over context, over heads.

    The model is run in evaluation mode on the batch, on its own kernels, and is left exactly as it was: parameters,
    buffers, gradients, training flags, random state, hooks and registries. Of a distributed model every process calls
    this with its own part of the batch, and every process gets the report on the whole batch.

    Args:
        model: a module, a SPEC (hub id, directory, `arch:…`, `config.json`, `python:…`) or what `spec.load` gave.
        batch: what the model is called with: a mapping becomes keyword arguments, a tuple positional ones, a tensor the
            only one; an iterable of these is accumulated. By default, eight documents of the text that ships with the
            package where the model has a tokenizer, else random tokens or synthetic images.
        mask: (sequences, tokens), which tokens are real; by default `attention_mask` in the batch.
        spectrum: also take the singular values of every attention map; this is the dear part at long contexts.
        heads: take singular values of these heads only, such as `3.5` (layer 3, head 5) or `decoder.3.5`.
        contexts: also take every number at these lengths, rising, and the slope of each over them: causal models are
            read by position in the one pass, others are run at each length on the same sequences, cut.
        gradients: also go back through the model: through its own loss where the batch makes it return one (labels),
            else through random projections of its last states. Costs the memory of a backward pass.
        probes: number of random projections.
        weights: also measure the weights themselves, by their role in the blocks, and what heads write through W_O.
        blocks: path of the list of blocks (`transformer.h`), where they are not found by themselves.
        batch_statistics: batch norms use the mean and variance of each batch, as in training, instead of their running
            ones; the running ones are left as they were.
        reference: also measure the same architecture at its own random initialisation on the same batch and at the
            same contexts, without singular values; costs a second copy of the weights while that lasts.
        verify: test suspicions by intervention: blocks are skipped, heads silenced, states replaced, and the change of
            the model's own loss (or of its output distribution, or its final state) is taken, document by document.
            Costs a forward of the batch for each, outside of the time budget.
        target_dtypes: dtypes whose range the numbers must fit too: float16, bfloat16, float8_e4m3, float8_e5m2.
        epsilon: the optimiser's, with which gradients of queries and keys are compared; needs gradients and weights.
        seed: for the default batch and for starting blocks of the iterations.
        memory: of a checkpoint named by a SPEC, the most that its weights may fill, such as `2GiB`; what does not fit
            is fetched layer by layer.
        seconds: a time budget, from when model and inputs are ready. Where it is too short, less is sampled, in this
            order: singular values of one sequence, of fewer heads, none; fewer sequences. Gradients come last: of what
            was read where there is time for that, else of one sequence through one projection. One sequence is always
            read; what was lowered is in the notes. Weights (`weights=True`) are measured whole, outside of the budget.
            See `fullrank.verbs.within` for how far it can be overdrawn.
        progress: called with a few words and the share done.

    Returns:
        The report: every number with its scope, its standard error over sequences and whether it is exact; its
        reference; its verdicts.

    Raises:
        BatchError: where the batch does not fit the model.
        NonFiniteError: where weights or activations are not finite; names the first module.
        FullrankError: for other bad input; see its subclasses.
    """
    started = time.perf_counter()
    held = held_against(target_dtypes, epsilon)
    chosen, probes = chosen_heads(heads, spectrum=spectrum), checked_probes(probes)  # before anything is loaded
    subject, ranks = _subject(model, seed, memory)
    network = subject.model
    ranks.agree(lambda: require_finite_weights(network))
    lengths = checked_contexts(contexts, ranks)
    given, calls = ranks.agree(lambda: _calls(subject, batch, mask, seed, ranks, contexts=lengths))
    if verify:
        require_testable(calls, ranks)
    hear = progress or (lambda what, share: None)
    tell = stretch(hear, 0.0, _MEASURED if reference else 1.0)
    budget = _budget(seconds, lengths, ranks)
    with undisturbed(network, batch_statistics=batch_statistics):
        tell("finding the blocks", 0.0)
        anatomy = anatomy_of(network, calls, ranks, blocks=blocks)
        forward = 0.0 if budget is None else budget.seconds - budget.left  # that of the survey
        if lengths and all(stack.over == "samples" for stack in anatomy.stacks):
            raise BatchError(f"contexts= was given, but {subject.name} has no tokens: its items are one vector each.")
        make = partial(_observers, anatomy, spectrum=spectrum, seed=seed, chosen=chosen)
        by_length = partial(make, drawn=False)
        if weights:
            make = partial(make, model=network)
        observers, backwards, differentiated = make(), None, ""
        if gradients and budget is None:
            several = len(calls) > 1 or ranks.several
            observers += gradient_observers(network, anatomy, several=several)
            first = ranks.before(sum(call.sequences for call in calls))
            backwards = Backwards(network, probes=probes, seed=seed, first=first)
        plan = ContextPlan(lengths, calls, anatomy, by_length, closing=given.closing if given else 0)
        if budget is None:
            notes = record(network, calls, anatomy, [*observers, *plan.observers], tell, ranks, backwards)
            differentiated = str(backwards.about) if backwards is not None else ""
        else:
            each = forward / max(1, calls[0].sequences)
            named = None if chosen is None else len(chosen.named)
            read = record_within(
                budget, network, calls, anatomy, make, tell, forward=forward, spectrum=spectrum, named=named
            )
            observers, notes, calls = read.observers, read.notes, read.calls
            given = given and replace(given, tokens=None)  # those of the sequences that were read
            if gradients:
                more, said, differentiated = backwards_within(
                    budget, network, calls, anatomy, tell, forward=each, probes=probes, seed=seed
                )
                observers, notes = [*observers, *more], list(dict.fromkeys([*notes, *said]))
        by_context = plan.finish(network, observers, tell)
        of_weights = weight_rows(network, anatomy, seed=seed) if weights else []
    observers = ranks.merged(observers)
    rows = [*(row for observer in observers for row in observer.rows()), *by_context.rows, *of_weights]
    notes = [*notes, *by_context.notes, *statistics_notes(network, batch_statistics=batch_statistics)]
    drawn = reference_of(
        subject,
        calls,
        anatomy,
        unwanted="" if reference and (budget is None or budget.left > _FORWARDS * forward) else _UNWANTED[reference],
        seed=seed,
        tell=stretch(hear, _MEASURED, 1.0),
        ranks=ranks,
        gradients=gradients and budget is None,
        probes=probes,
        weights=weights,
        batch_statistics=batch_statistics,
        blocks=blocks,
        known=notes,
        contexts=lengths,
        closing=given.closing if given else 0,
    )
    told = about(subject, given, calls, anatomy, [*notes, *drawn.notes], ranks, observers) | {
        "nulls": null_values(anatomy, observers, seed),
        "seed": seed,
    }
    if gradients:
        told["gradients"] = differentiated
    report = Report(
        rows=Table(rows), about=told, spectra=kept_spectra(observers), context_slopes=tuple(by_context.slopes)
    )
    hear("looking for failures", 1.0)
    report = diagnosed(
        report, subject, calls, anatomy, drawn, held=held, verify=verify, batch_statistics=batch_statistics
    )
    return replace(report, about=told | {"seconds": round(time.perf_counter() - started, 3)})


_MEASURED = 0.7  # of the progress, where a reference follows
_FORWARDS = 4  # what a reference costs, in forwards of the first call: the survey, a forward, and measuring it
_UNWANTED = {
    False: "none was asked for (reference=False, --no-reference)",
    True: "the time budget leaves no room for it",
}


def _budget(seconds: float | None, contexts: tuple[int, ...], ranks: Ranks) -> Budget | None:
    if seconds is None:
        return None
    if contexts or ranks.several:
        other = "contexts=: every length is read whole" if contexts else "a distributed model: its processes read alike"
        raise BatchError(f"seconds={seconds:g} does not go with {other}.")
    return Budget(seconds)


def _subject(model: nn.Module | str | Subject, seed: int, memory: str | int | None) -> tuple[Subject, Ranks]:
    if isinstance(model, str):
        model = loaded(model, seed=seed, memory=memory)
    elif memory is not None:
        raise SpecError(f"memory={memory!r} goes with a SPEC; this {type(model).__name__} is loaded already.")
    wrapped = model.model if isinstance(model, Subject) else model
    if not isinstance(wrapped, nn.Module):
        raise BatchError(f"model={type(model).__name__} is neither a module nor a SPEC.")
    notes: list[str] = []
    network = bare(wrapped, notes)
    subject = replace(model, model=network) if isinstance(model, Subject) else subject_of(network)
    missing = named_alone(network)
    if missing:
        notes.append(
            f"its configuration names the repairs {', '.join(missing)}, which are not in force: this is the "
            "model without them."
        )
    return replace(subject, notes=(*subject.notes, *notes)), ranks_of(wrapped)


def _calls(
    subject: Subject, batch: Any, mask: Tensor | None, seed: int, ranks: Ranks, *, contexts: Sequence[int] = ()
) -> tuple[Inputs | None, list[Call]]:
    if batch is None and ranks.several:
        raise BatchError(
            f"batch=None: {type(subject.model).__name__} is distributed, and every process passes its own part of the "
            "batch; by default all would read the same texts."
        )
    given = batch if isinstance(batch, Inputs) else None
    if batch is None:
        given = inputs(subject, context=longest_context(contexts, subject), seed=seed)
    if given is None:
        return None, as_calls(subject.model, batch, mask)
    return given, as_calls(subject.model, list(given.batches), mask, known=given.real)


def _observers(
    anatomy: Anatomy,
    *,
    spectrum: bool,
    seed: int,
    chosen: Heads | None = None,
    drawn: bool = True,
    sequences: int = SEQUENCES,
    model: nn.Module | None = None,
) -> list[Observer]:
    if isinstance(chosen, ChosenHeads):
        chosen.require({stack.name: len(stack.paths) for stack in anatomy.stacks})
    causal = [stack.name for stack in anatomy.stacks if stack.causal]
    summaries = Summaries()
    observers: list[Observer] = [Finite(), StreamObserver(causal=causal), AttentionObserver(summaries)]
    if spectrum:
        observers.append(SpectrumObserver(summaries, seed=seed, heads=chosen, drawn=drawn, sequences=sequences))
    if model is not None:  # what heads write through W_O
        observers.append(HeadObserver(model, anatomy, summaries))
    if not spectrum:
        return [*observers, FreedMemory()]
    # freed memory is given back after each observer, before the next one asks for blocks of other sizes
    return [one for observer in observers for one in (observer, FreedMemory(observer.needs))]
