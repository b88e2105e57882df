"""One forward and the backwards through it: gradients of the stream, of attention and of every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fullrank.capture import Anatomy, Backward, ParameterGradient, Recorder
from fullrank.capture.backward import awake, own_loss, parameter_gradients, projected_ends, projection
from fullrank.capture.events import Observer
from fullrank.capture.taking_part import taking_part
from fullrank.errors import BatchError
from fullrank.measure import GradientObserver, ParameterObserver
from fullrank.verbs.batches import Call

__all__ = ["Backwards", "Differentiated", "forward_and_back", "gradient_observers"]

_NO_SOURCE = "there is neither a loss nor a last state that gradients could come from"
_NO_PART = "it took no part in the forward of a sharded model, or was frozen when that was sharded"
_NO_HISTORY = (
    "the model returned no loss, and no last state that could be read was computed with gradients (reentrant "
    "activation checkpointing and torch.no_grad inside of a model prevent that)"
)

_SMALL = (
    "gradients are those of float16 without a loss scale: entries below 1e-6 are coarse and below 3e-8 zero, and a "
    "loss averaged over a thousand tokens has such entries; float32 and bfloat16 keep them."
)
_INFERENCE = "torch.inference_mode is on around this call"


@dataclass(frozen=True)
class Differentiated:
    """What was differentiated.

    Attributes:
        of: the model's own loss, random projections of its last stream states, or nothing.
        probes: how many backwards were run.
        stacks: whose last states were projected.
    """

    of: Literal["loss", "projection", "nothing"]
    probes: int = 1
    stacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        match self.of:
            case "loss":
                return "the model's own loss"
            case "projection":
                return f"{self.probes} random projections of the last stream state of {' and '.join(self.stacks)}"
        return "nothing"


def forward_and_back(
    model: nn.Module,
    call: Call,
    recorder: Recorder,
    *,
    probes: int = 4,
    seed: int = 0,
    first: int = 0,
) -> tuple[Differentiated, list[str]]:
    """Run a call once with gradients and go back through it; the recorder feeds its observers.

    The model's own loss is differentiated where it returns one, multiplied by the number of sequences: a sequence's
    gradient then does not depend on how many others there are. Else each of the `probes` backwards is of Σ X_L ⊙ G over
    the last stream states, G standard normal on real tokens.

    Args:
        model: in the state it is to be looked at (see `undisturbed`).
        call: what it is called with.
        recorder: entered, with an observer that looks at gradients.
        probes: number of random projections.
        seed: of the projections.
        first: place of the call's first sequence among all sequences that are looked at.

    Returns:
        What was differentiated, and sentences about what could not be.

    Raises:
        RuntimeError: what an observer raised; a fault of the model's own backward becomes a sentence.
    """
    with (
        torch.enable_grad(),
        awake(model) as (named, asleep),
        taking_part(model, named) as parameters,
    ):
        output = call.run(model)
        asleep |= dict.fromkeys(named.keys() - parameters.keys(), _NO_PART)
        watch, ends = recorder.watch, recorder.ends()
        loss = own_loss(output)
        del output
        chosen, notes = projected_ends(ends) if loss is None else ([], [])
        if loss is None and not chosen:
            watch.unreached = _NO_SOURCE if ends else _INFERENCE if torch.is_inference_mode_enabled() else _NO_HISTORY
            return Differentiated("nothing", 0), [*notes, f"no gradients: {watch.unreached}."]
        if loss is not None and not _sharded(parameters) and not bool(loss.detach().isfinite()):
            watch.unreached = f"the model's own loss is {float(loss.detach()):g}, as where no label counts"
            return Differentiated("nothing", 0), [f"no gradients: {watch.unreached}."]
        if loss is not None and any(parameter.dtype == torch.float16 for parameter in parameters.values()):
            notes.append(_SMALL)
        sequences = call.sequences
        names = tuple(end.stack.name for end in chosen)
        about = Differentiated("loss") if loss is not None else Differentiated("projection", probes, names)
        recorder.emit(Backward("loss" if loss is not None else "projection", sequences, names))
        for name, reason in asleep.items():
            parameter = model.get_parameter(name)
            recorder.emit(ParameterGradient(name, parameter.detach(), None, sequences, reason=reason))
        outputs = [loss] if loss is not None else [end.value for end in chosen]
        came: set[str] = set()
        for probe in range(about.probes):

            def take(name: str, gradient: Tensor, probe: int = probe) -> None:
                event = ParameterGradient(name, parameters[name].detach(), gradient, sequences, probe)
                came.add(name)
                try:
                    recorder.emit(event)
                except Exception as fault:
                    watch.faults.append(fault)
                    raise

            if loss is not None:
                weights = [torch.full_like(loss, sequences)]
            else:
                weights = [projection(end, seed=seed, probe=probe, first=first) for end in chosen]
            starts = [start for start in watch.starts if not any(start is p for p in parameters.values())]
            try:
                unused = parameter_gradients(
                    outputs, weights, parameters, take, through=starts, retain_graph=probe + 1 < about.probes
                )
            except (RuntimeError, NotImplementedError) as fault:
                if watch.faults:
                    raise
                said = (str(fault).strip() or type(fault).__name__).splitlines()[0]
                watch.unreached = f"the model's backward failed: {said}"
                for name in parameters.keys() - came:
                    weight = parameters[name].detach()
                    recorder.emit(ParameterGradient(name, weight, None, sequences, probe, watch.unreached))
                left = "no gradients but those that had come by then" if came else "no gradients"
                return Differentiated("nothing", 0), [*notes, f"{left}: {watch.unreached}"]
            for name in unused:
                why, weight = f"it does not enter {about}", named[name].detach()
                whole = not hasattr(weight, "device_mesh")
                # a loss is all there is
                zero = weight.new_zeros(()).expand(weight.shape) if loss is not None and whole else None
                recorder.emit(ParameterGradient(name, weight, zero, sequences, probe, why))
        return about, notes


class Backwards:
    """Runs the calls of one model forward and back, in order, and remembers what was differentiated.

    Args:
        model: in the state it is to be looked at (see `undisturbed`).
        probes: number of random projections, where there is no loss.
        seed: of the projections.
        first: place of the first call's first sequence among those of all processes.
    """

    def __init__(self, model: nn.Module, *, probes: int = 4, seed: int = 0, first: int = 0) -> None:
        self.about = Differentiated("nothing", 0)
        self._model = model
        self._probes = probes
        self._seed = seed
        self._first = first

    def __call__(self, call: Call, recorder: Recorder) -> list[str]:
        """Run one call under a recorder.

        Args:
            call: the next one.
            recorder: entered for it.

        Returns:
            Sentences about what could not be differentiated.

        Raises:
            BatchError: where an earlier call gave a loss and this one none, or the other way round.
        """
        about, notes = forward_and_back(
            self._model,
            call,
            recorder,
            probes=self._probes,
            seed=self._seed,
            first=self._first,
        )
        self._first += call.sequences
        if "nothing" not in (about.of, self.about.of) and about.of != self.about.of:
            raise BatchError("batch: only some of its batches gave a loss; put labels into all of them or into none.")
        if about.of != "nothing":
            self.about = about
        return notes


def _sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Whether a process that goes not back keeps others waiting."""
    return any(hasattr(parameter, "device_mesh") for parameter in parameters.values())


def gradient_observers(model: nn.Module, anatomy: Anatomy, *, several: bool) -> list[Observer]:
    """What looks at gradients: of the stream and of attention, and of parameters.

    Args:
        model: that was surveyed.
        anatomy: what the survey found.
        several: whether there are several batches or processes, whose parameters' gradients must be added up.

    Returns:
        The observers.
    """
    causal = [stack.name for stack in anatomy.stacks if stack.causal]
    return [GradientObserver(causal=causal), ParameterObserver(model, anatomy, several=several)]
