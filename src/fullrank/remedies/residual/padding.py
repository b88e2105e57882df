"""Which tokens of a batch are no padding, before anything in the model attends: from the mask it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fullrank.capture import undisturbed
from fullrank.capture.wrappers import bare
from fullrank.edit import Call, Edit, rewrite_attention
from fullrank.edit.carried import Carried, carry
from fullrank.edit.forwards import EditedForward, Enclosed
from fullrank.edit.handle import make
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.patient import Patient

__all__ = ["Padding", "padding_of"]

Sense = Literal["real", "hidden"]
"""Whether what is not zero in a mask is a real token, or is hidden."""


class Padding:
    """Where norms find which tokens are real.

    Args:
        carried: what layers share.
        masks: for each stack the argument of the model that says so, with its sense; a stack that is not there was seen
            without padding.
    """

    def __init__(self, carried: Carried, masks: Mapping[str, tuple[str, Sense]]) -> None:
        self.carried, self.masks = carried, dict(masks)

    def real(self, stack: str, tokens: Tensor) -> Tensor | None:
        """Which tokens of a stack are real in the forward that runs.

        Args:
            stack: its name.
            tokens: a state of it, (sequences, tokens, width).

        Returns:
            (sequences, tokens, 1) bool; None where all are.

        Raises:
            EditError: where the mask does not fit the state.
        """
        if stack not in self.masks:
            return None
        name, sense = self.masks[stack]
        mask: Tensor | None = self.carried.get(name)
        if mask is None:
            return None
        real = mask != 0 if sense == "real" else mask == 0
        if real.shape[1] > tokens.shape[1]:  # a cache holds the others
            real = real[:, real.shape[1] - tokens.shape[1] :]
        if real.shape != tokens.shape[:2]:
            if real.numel() != tokens.shape[:2].numel():
                raise EditError(f"{name} is {tuple(mask.shape)}, and the state of {stack} {tuple(tokens.shape)}.")
            real = real.reshape(tokens.shape[:2])  # a flattened state
        return real.unsqueeze(-1)


def padding_of(patient: Patient) -> tuple[Padding, Callable[[], Iterator[Edit]]]:
    """Find the arguments that say which tokens are real.

    They are told by their values: a matrix with a number for each token that is the same as what attention is allowed
    to see in this batch. That it is no matrix of ones of another meaning, or another stack's, is seen in a forward in
    which a real token is called padding: attention of this stack must leave just that one out. Cost: two forwards, and
    one for each matrix that could be a mask.

    Args:
        patient: the model.

    Returns:
        Where to look, and the edits that put the masks there in every forward.

    Raises:
        RemedyError: where padding is hidden from attention and no argument says so.
    """
    given = _arguments(patient)
    masks: dict[str, tuple[str, Sense]] = {}
    unmasked: list[tuple[str, int, str]] = []
    turned: dict[tuple[str, Sense, tuple[int, int]], list[_Seen]] = {}

    def follows(one: _Seen, name: str, sense: Sense) -> bool:
        """Whether the attention leaves out what the argument calls padding."""
        place = _turned_place(one.real)
        if place is None:
            return not bool(one.real.all())
        if (name, sense, place) not in turned:
            turned[name, sense, place] = _seen_turned(patient, name, sense, place)
        expected = one.real.clone()
        expected[place] = False
        return any(
            (other.stack, other.layer, other.part) == (one.stack, one.layer, one.part)
            and torch.equal(other.real, expected)
            for other in turned[name, sense, place]
        )

    for one in _seen(patient):
        if one.stack in masks:
            continue
        found = (
            (name, sense)
            for name, matrix in given.items()
            for sense in _senses(matrix, one.real)
            if follows(one, name, sense)
        )
        told = next(found, None)
        if told is not None:
            masks[one.stack] = told
        elif not bool(one.real.all()):
            raise RemedyError(
                f"attention of {one.stack} is told to leave tokens out, and no argument of this "
                f"{type(patient.model).__name__} says which are real."
            )
        elif not one.masked:
            unmasked.append((one.stack, one.layer, one.part))
    carried = Carried()
    padding = Padding(carried, masks)

    def edits() -> Iterator[Edit]:
        whole = bare(patient.model)
        names = list(inspect.signature(whole.forward).parameters)
        places = {name: names.index(name) for name in dict.fromkeys(name for name, _ in masks.values())}
        yield make("tell padding", [type(whole).__name__], [lambda: Enclosed(whole, _Telling(carried, places))])
        yield carry(whole, carried)
        for stack, layer, part in unmasked:
            if stack not in masks:
                yield rewrite_attention(
                    patient.model, patient.anatomy, before=_refuse_masks, stack=stack, layer=layer, part=part
                )

    return padding, edits


class _Telling:
    """Around the model, inside of what carries."""

    what = "tell padding"

    def __init__(self, carried: Carried, places: Mapping[str, int]) -> None:
        self._carried, self._places = carried, dict(places)

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        for name, at in self._places.items():
            self._carried.put(name, kwargs[name] if name in kwargs else args[at] if at < len(args) else None)
        return run(*args, **kwargs)


def _refuse_masks(call: Call) -> Call:
    if call.mask is not None and not torch.compiler.is_compiling():  # some make one then for causality alone
        raise EditError(
            f"attention in {call.place.path} is given a mask, and had none when the model was repaired: which tokens "
            "are padding is not known; repair it with a padded batch."
        )
    return call


def _arguments(patient: Patient) -> dict[str, Tensor]:
    """The matrices that the model is called with, by name."""
    whole, found = bare(patient.model), {}

    def look(module: Any, args: Any, kwargs: Any) -> None:
        names = list(inspect.signature(whole.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        found.update(
            {name: one for name, one in given.items() if isinstance(one, Tensor) and one.ndim == 2 and name in names}
        )

    hook = whole.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with undisturbed(patient.model), torch.no_grad():
            patient.forward()
    finally:
        hook.remove()
    return found


@dataclass(frozen=True, eq=False)
class _Seen:
    """A self-attention call: its place, (sequences, tokens) keys that some query sees, and whether it has a mask."""

    stack: str
    layer: int
    part: str
    real: Tensor
    masked: bool


def _seen(patient: Patient) -> list[_Seen]:
    """The self-attention calls of a forward."""
    found = []

    def look(call: Call) -> Call:
        if not call.place.part.startswith("cross") and call.queries == call.keys:
            visible = call.visible()
            shape = (call.value.shape[0], call.keys)
            real = torch.ones(shape, dtype=torch.bool) if visible is None else visible.any(1).any(1).expand(shape)
            masked = call.mask is not None or call.logits is not None
            found.append(_Seen(call.place.stack, call.place.layer, call.place.part, real.cpu(), masked))
        return call

    with undisturbed(patient.model), torch.no_grad(), rewrite_attention(patient.model, patient.anatomy, before=look):
        patient.forward()
    return found


def _turned_place(real: Tensor) -> tuple[int, int] | None:
    """The last real token of the first sequence that has another one; None where there is none."""
    rows = (real.sum(1) > 1).nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    return row, int(real[row].nonzero()[-1])


def _seen_turned(patient: Patient, name: str, sense: Sense, place: tuple[int, int]) -> list[_Seen]:
    """The self-attention calls of a forward in which an argument calls one token padding; none where that fails."""
    whole = bare(patient.model)
    at = list(inspect.signature(whole.forward).parameters).index(name)

    def turn(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs[name] if name in kwargs else args[at]
        mask = mask.clone()
        hidden = float("-inf") if mask.is_floating_point() else 1
        if mask.is_floating_point() and bool((mask != 0).any()):
            hidden = float(mask.min())  # as the others are hidden
        mask[place] = 0 if sense == "real" else hidden
        if name in kwargs:
            return args, {**kwargs, name: mask}
        return (*args[:at], mask, *args[at + 1 :]), kwargs

    hook = whole.register_forward_pre_hook(turn, with_kwargs=True)
    try:
        return _seen(patient)
    except Exception:  # noqa: BLE001 - whatever a model says to such an argument, it is no mask
        return []
    finally:
        hook.remove()


def _senses(mask: Tensor, real: Tensor) -> Iterator[Sense]:
    """In which senses a matrix says what is real."""
    if mask.shape != real.shape:
        return
    mask = mask.cpu()
    if bool(((mask == 0) | (mask == 1)).all()) and torch.equal(mask != 0, real):
        yield "real"
    hidden = mask.dtype == torch.bool or (mask.is_floating_point() and bool((mask <= 0).all()))
    if hidden and torch.equal(mask == 0, real):
        yield "hidden"
