"""Repair a model: apply remedies, and undo them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fullrank.capture.wrappers import bare
from fullrank.errors import BatchError, RemedyError
from fullrank.remedies import Prescription, Repair, asked_for, repaired
from fullrank.spec import Subject, inputs, subject_of
from fullrank.verbs.batches import Call, as_calls

__all__ = ["call_for", "repair"]


def repair(model: nn.Module, remedies: Prescription, *, batch: Any = None, **parameters: Any) -> Repair:
    """Apply one remedy or several to a model.

    ```python
    with fullrank.repair(model, "center-attention") as repair:
        print(repair)                                    # what was changed, where, and what it did to the output
        report = fullrank.examine(model, batch)
    fullrank.repair(model, ["qk-norm", "value-residual"])             # stays, is trained and saved, until `.undo()`
    fullrank.repair(model, "temperature?kind=log-context&scale=0.5")
    ```

    Nothing but the model's forward, its weights where the remedy is one of weights, and parameters that the remedy adds
    is changed. A few forwards on the batch find the model's blocks and prove that each remedy acts.

    Args:
        model: any model that `examine` sees into.
        remedies: a name, `name?parameter=value&…`, a list of these, or a mapping from names to parameters. In order.
        batch: what the model is called with; by default one made for it.
        parameters: of the remedies; see `fullrank.remedies.CATALOGUE` or `fullrank remedies NAME`.

    Returns:
        A context manager and a handle.

    Raises:
        RemedyError: for an unknown remedy, a parameter out of range, a model that it does not fit; nothing is changed.
        FullrankError: for other bad input; see `examine`.
    """
    asked = asked_for(remedies, parameters)
    if not isinstance(model, nn.Module):
        raise RemedyError(f"repair takes a torch module, and was given {type(model).__name__}.")
    call = call_for(model, batch)
    return repaired(model, lambda: call.run(model), asked)


def call_for(model: nn.Module | Subject, batch: Any = None, *, seed: int = 0) -> Call:
    """The one call on which a model is looked at.

    Args:
        model: the model, or what `spec.load` gave.
        batch: what it is called with; of several batches the first is taken.
        seed: of the default batch.

    Returns:
        The call.

    Raises:
        BatchError: where none is given and none can be made.
    """
    subject = model if isinstance(model, Subject) else subject_of(bare(model, []))
    network = subject.model if isinstance(model, Subject) else model
    if batch is not None:
        return as_calls(network, batch)[0].for_survey()
    try:
        made = inputs(subject, seed=seed)
    except BatchError as reason:
        raise BatchError(f"batch= is needed: {reason}") from None
    calls = as_calls(network, list(made.batches), known=made.real)
    return calls[0].part(0, 2) if calls[0].divisible else calls[0]
