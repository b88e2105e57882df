"""The first layer's values where later layers attend: what value residuals and NeuTRENO have in common."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fullrank.edit import Call, Carried, Edit, carry, together
from fullrank.edit.rewriting import After, Before
from fullrank.errors import EditError
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.score_carrying import layers_of

__all__ = ["FirstValues", "Putting", "with_first_values"]


class FirstValues:
    """Where the first layer of each stack puts its values and later ones find them.

    Args:
        carried: what the layers of a forward share.
        firsts: (stack, part) → number of the first block call that attends.
    """

    def __init__(self, carried: Carried, firsts: dict[tuple[str, str], int]) -> None:
        self.carried, self.firsts = carried, firsts

    def first(self, call: Call) -> bool:
        """Whether it is the first layer's."""
        return call.place.layer == self.firsts[call.place.stack, call.place.part]

    def put(self, call: Call) -> None:
        """Keep V_1."""
        self.carried.put((call.place.stack, call.place.part), call.value)

    def of(self, call: Call) -> Tensor:
        """V_1, for a later layer.

        Returns:
            As wide and long as the call's own.

        Raises:
            EditError: where it has another form.
        """
        first: Tensor = self.carried.get((call.place.stack, call.place.part))
        if first.shape != call.value.shape:
            raise EditError(
                f"the first layer's values {tuple(first.shape)} cannot be used in {call.place.path}, where they are "
                f"{tuple(call.value.shape)}."
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
    firsts = {key: calls[0].place.layer for key, calls in layers_of(patient, remedy).items()}
    carried = Carried()
    values = FirstValues(carried, firsts)

    def later(site: Site) -> bool:
        return any(call.place.layer > firsts[call.place.stack, call.place.part] for call in site.calls)

    def make_before(site: Site) -> Before:
        return before(site, values) if later(site) else Putting(values)

    def make_after(site: Site) -> After | None:
        return after(site, values) if after is not None and later(site) else None

    edits = [carry(patient.model, carried)]
    try:
        edits.append(patient.rewrite(remedy, before=make_before, after=make_after))
    except BaseException:
        edits[0].undo()
        raise
    where = edits[1].where
    edit = together(edits)
    edit.where = where
    return edit
