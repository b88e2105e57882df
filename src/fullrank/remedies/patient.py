"""The model that a remedy is applied to, with what remedies ask about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from fullrank.capture import Anatomy, survey, undisturbed
from fullrank.capture.weights import Weight
from fullrank.edit import (
    Branches,
    Call,
    Carried,
    Edit,
    Norms,
    Place,
    carry,
    find_branches,
    find_norms,
    rewrite_attention,
    together,
)
from fullrank.edit.places import module_at
from fullrank.edit.rewriting import After, Before
from fullrank.errors import EditError, FullrankError, RemedyError

__all__ = ["Patient", "Seen", "Site"]


@dataclass(frozen=True)
class Seen:
    """One attention call as it happened in the forward that was looked at.

    Attributes:
        place: stack, layer, part and path.
        kernel: what the model calls.
        heads: number of query heads.
        key_value_heads: number of key and value heads.
        width: of a head's queries and keys; None where the model softmaxes by itself and shows its scores alone.
        value_width: of a head's values.
        queries: how many.
        keys: how many.
        causal: whether no query saw a later key.
        masked: whether a mask tensor came with the call.
        scale: of the scores; None where it is not known.
        input_width: of what the calling module was given; None where it was given no stream.
        device: of the values.
        dtype: of the values.
    """

    place: Place
    kernel: str
    heads: int
    key_value_heads: int
    width: int | None
    value_width: int
    queries: int
    keys: int
    causal: bool
    masked: bool
    scale: float | None
    input_width: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def kind(self) -> Literal["self", "cross"]:
        """Whether it attends to its own stream or to another."""
        return "cross" if self.place.part.startswith("cross") else "self"


@dataclass(frozen=True)
class Site:
    """A module that calls an attention kernel, with all its calls in one forward; several where it is shared.

    Attributes:
        path: name of the module.
        calls: in order.
    """

    path: str
    calls: tuple[Seen, ...]

    @property
    def first(self) -> Seen:
        """Its first call."""
        return self.calls[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """The block calls in which it is called, from 1."""
        return tuple(call.place.layer for call in self.calls)


class Patient:
    """A model under repair. What is asked about it is found in forwards that leave it as it is, once each.

    Args:
        model: the model.
        forward: one forward pass of it.
        anatomy: its anatomy where that is known, since nothing but values of weights has changed; looked at otherwise.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], Any], anatomy: Anatomy | None = None) -> None:
        self.model, self.forward = model, forward
        if anatomy is not None:
            self.__dict__["anatomy"] = anatomy  # where the cached property looks

    @property
    def known(self) -> Anatomy | None:
        """Its anatomy, where somebody has asked for it."""
        return self.__dict__.get("anatomy")

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its stacks of blocks, attention calls and weights."""
        with undisturbed(self.model), torch.no_grad():
            return survey(self.model, self.forward)

    @cached_property
    def branches(self) -> Branches:
        """What is added to its streams, and which modules return it."""
        with torch.no_grad():
            return find_branches(self.model, self.forward, self.anatomy)

    @cached_property
    def norms(self) -> Norms:
        """The norms of its streams and branches."""
        with torch.no_grad():
            return find_norms(self.model, self.forward, self.anatomy, self.branches)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The modules that call attention kernels.

        Raises:
            RemedyError: where there is none, or a kernel cannot be rewritten.
        """
        look = _Look()
        try:
            edit = rewrite_attention(self.model, self.anatomy, before=look)
            with edit, undisturbed(self.model), torch.no_grad():
                self.forward()
        except EditError as reason:
            raise RemedyError(f"attention of this {type(self.model).__name__} cannot be changed: {reason}") from None
        found: dict[str, list[Seen]] = {}
        for seen in look.seen:
            found.setdefault(seen.place.path, []).append(seen)
        return tuple(Site(path, tuple(calls)) for path, calls in found.items())

    @property
    def self_attention(self) -> tuple[Site, ...]:
        """The modules that attend to their own stream.

        Raises:
            RemedyError: where there is none.
        """
        found = tuple(site for site in self.sites if site.first.kind == "self")
        if not found:
            raise RemedyError(f"this {type(self.model).__name__} has no self-attention.")
        return found

    def weights(self, *roles: str, part: str | None = None) -> list[tuple[str, int, Weight]]:
        """Weights that play one of some roles.

        Args:
            roles: of `q k v o up gate down`.
            part: only those that serve this attention call, such as `self`.

        Returns:
            (stack, layer, weight) in the order of the forward; also those that cannot be read, with their reason.
        """
        return [
            (stack.name, layer, weight)
            for stack in self.anatomy.stacks
            for layer, weights in enumerate(stack.weights, 1)
            for weight in weights
            if weight.role in roles and part in (None, weight.call)
        ]

    def _dtype(self, site: Site) -> torch.dtype:
        """Of the weights beside which parameters are added: sharding and optimisers want one."""
        module = module_at(self.model, site.path)
        found = (p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
        return next(found, site.first.dtype)

    def rewrite(
        self,
        name: str,
        *,
        before: Callable[[Site], Before | None] | None = None,
        after: Callable[[Site], After | None] | None = None,
        sites: Sequence[Site] | None = None,
        carried: Carried | None = None,
    ) -> Edit:
        """Rewrite the calls of attention modules, each with what is made for it.

        What is made is given the device of the site's values and the dtype of its weights, where it is a module. A site
        for which nothing is made is left as it is.

        Args:
            name: of the remedy; modules are registered as `fullrank_<name>_before` and `…_after`.
            before: makes what changes the calls of a site.
            after: makes what changes their output.
            sites: which; all self-attention by default.
            carried: what the changes share from layer to layer.

        Returns:
            One handle.

        Raises:
            RemedyError: where nothing is made for any site.
        """
        registered = "fullrank_" + name.replace("-", "_")
        places: list[str] = []

        def edits() -> Iterator[Edit]:
            if carried is not None:
                yield carry(self.model, carried)
            for site in self.self_attention if sites is None else sites:
                changes = {"before": before and before(site), "after": after and after(site)}
                for one in changes.values():
                    if isinstance(one, nn.Module):
                        one.to(device=site.first.device, dtype=self._dtype(site))
                if any(one is not None for one in changes.values()):
                    edit = rewrite_attention(self.model, self.anatomy, path=site.path, name=registered, **changes)  # type: ignore[arg-type]
                    places.extend(edit.where)
                    yield edit
            if not places:
                raise RemedyError(f"{name} finds nothing to change in this {type(self.model).__name__}.")

        edit = together(edits())
        edit.where = tuple(places)  # what is carried has no place of its own
        return edit


class _Look:
    """Notes the form of each call and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def __call__(self, call: Call) -> Call:
        self.seen.append(_seen(call))
        return call


def _seen(call: Call) -> Seen:
    rows = call.query if call.query is not None else call.logits
    assert rows is not None
    try:
        visible = call.visible()
    except FullrankError:  # its mask is code
        visible = None
    ahead = visible is None or bool(visible.triu(1).any())
    return Seen(
        place=call.place,
        kernel=call.kernel,
        heads=rows.shape[1],
        key_value_heads=call.value.shape[1],
        width=None if call.query is None else call.query.shape[-1],
        value_width=call.value.shape[-1],
        queries=call.queries,
        keys=call.keys,
        causal=call.causal or not ahead,
        masked=call.mask is not None,
        scale=None if call.query is None else call.scale if call.scale is not None else call.query.shape[-1] ** -0.5,
        input_width=None if call.input is None else call.input.shape[-1],
        device=call.value.device,
        dtype=call.value.dtype,
    )
