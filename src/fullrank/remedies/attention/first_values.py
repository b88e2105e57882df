"""The first layer's values where later layers attend: what value residuals and NeuTRENO have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.capture import undisturbed
from fullrank.edit import Call, Carried, Edit, rewrite_attention
from fullrank.edit.rewriting import After, Before
from fullrank.errors import EditError
from fullrank.remedies.attention.score_carrying import layers_of
from fullrank.remedies.patient import Patient, Seen, Site

__all__ = ["FirstValues", "Putting", "with_first_values"]


class FirstValues:
    """Where the first layer of each stack puts its values and later ones find them.

    Args:
        carried: what the layers of a forward share.
        firsts: (stack, part) → number of the first block call that attends.
        widths: (stack, part) → columns of values beyond which other edits have put zeros alone, where they have.
    """

    def __init__(
        self, carried: Carried, firsts: dict[tuple[str, str], int], widths: dict[tuple[str, str], int]
    ) -> None:
        self.carried, self.firsts, self.widths = carried, firsts, widths

    def first(self, call: Call) -> bool:
        """Whether it is the first layer's."""
        return call.place.layer == self.firsts[call.place.stack, call.place.part]

    def put(self, call: Call) -> None:
        """Keep V_1."""
        self.carried.put((call.place.stack, call.place.part), call.value)

    def of(self, call: Call, V: Tensor) -> Tensor:
        """V_1, for a later layer.

        Args:
            call: the layer's.
            V: its values.

        Returns:
            As wide and long as these: cut to the columns that are no padding, and padded as these are.

        Raises:
            EditError: where it has another form.
        """
        key = call.place.stack, call.place.part
        first: Tensor = self.carried.get(key)
        wide, width = V.shape[-1], self.widths.get(key)
        if width is not None and first.shape[:-1] == V.shape[:-1] and width <= wide != first.shape[-1]:
            return functional.pad(first[..., :width], (0, wide - width))
        if first.shape != V.shape:
            raise EditError(
                f"the first layer's values {tuple(first.shape)} cannot be used in {call.place.path}, where they are "
                f"{tuple(V.shape)}."
            )
        return first


class Putting:
    """Keeps the values of the first layer; changes nothing."""

    def __init__(self, values: FirstValues) -> None:
        self.values = values

    def __call__(self, call: Call) -> Call:
        """The call as it is."""
        if self.values.first(call):
            self.values.put(call)
        return call


def with_first_values(
    patient: Patient,
    remedy: str,
    before: Callable[[Site, FirstValues], Before],
    after: Callable[[Site, FirstValues], After | None] | None = None,
) -> Edit:
    """Rewrite self-attention with V_1 of each stack at hand.

    Args:
        patient: the model.
        remedy: its name.
        before: makes what changes the calls of a module that is called beyond the first layer.
        after: makes what changes their output.

    Returns:
        One handle.

    Raises:
        RemedyError: where layers do not go together.
    """
    layers = layers_of(patient, remedy)
    firsts = {key: calls[0].place.layer for key, calls in layers.items()}
    carried = Carried()
    values = FirstValues(carried, firsts, _widths(patient, layers))

    def later(site: Site) -> bool:
        return any(call.place.layer > firsts[call.place.stack, call.place.part] for call in site.calls)

    def make_before(site: Site) -> Before:
        return before(site, values) if later(site) else Putting(values)

    def make_after(site: Site) -> After | None:
        return after(site, values) if after is not None and later(site) else None

    return patient.rewrite(remedy, before=make_before, after=make_after, carried=carried)


def _widths(patient: Patient, layers: dict[tuple[str, str], list[Seen]]) -> dict[tuple[str, str], int]:
    """The narrowest values of each stack and part, where some are wider and have zeros beyond."""
    widths = {key: [one.value_width for one in calls] for key, calls in layers.items()}
    padded = {key: min(several) for key, several in widths.items() if min(several) < max(several)}
    if not padded:
        return {}
    others: set[tuple[str, str]] = set()

    def look(call: Call) -> Call:
        key = call.place.stack, call.place.part
        if key in padded and bool((call.value[..., padded[key] :] != 0).any()):
            others.add(key)
        return call

    with undisturbed(patient.model), torch.no_grad(), rewrite_attention(patient.model, patient.anatomy, before=look):
        patient.forward()
    return {key: width for key, width in padded.items() if key not in others}
