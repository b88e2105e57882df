"""Edits of attention: rewrite what goes into a kernel and what comes out, replace a head's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.tap import heads_of
from fullrank.capture.tensors import stream_input
from fullrank.edit.call import Call
from fullrank.edit.dispatch import Lease, lease_for
from fullrank.edit.fitting import StateValue, new_value
from fullrank.edit.forwards import EditedForward, Turns
from fullrank.edit.handle import Change, Edit, make
from fullrank.edit.places import Place, chosen_layers, chosen_stacks, enclosing, module_at, place_in
from fullrank.edit.registered import Added, refuse_wrapped
from fullrank.edit.rewriting import After, Before, Rewriting
from fullrank.errors import EditError

__all__ = ["replace_heads", "rewrite_attention"]


def rewrite_attention(
    model: nn.Module,
    anatomy: Anatomy,
    *,
    before: Before | None = None,
    after: After | None = None,
    stack: str | None = None,
    layer: int | None = None,
    part: str | None = None,
    path: str | None = None,
    name: str = "rewrite",
) -> Edit:
    """Make attention calls with other queries, keys, values or masks, and hand on another output.

    The model's own kernel runs, on what `before` makes of the call; only a call whose map is replaced is computed as a
    product. Of several edits of one call the first made changes it first and its output last; every `after` sees the
    call as all of them made it. One of them at most may replace the kernel (`attend`), which happens last wherever it
    was made.

    `before` and `after` may be modules: then they become children of the modules that call the kernel, under `name`, so
    that optimisers, `state_dict`, `to()` and DDP find their parameters; undoing takes them out again, with the values
    that they have then.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        before: `call → call`, by `call.change(query=…, key=…, value=…, mask=…, bias=…, scale=…, logits=…, weights=…)`.
        after: `call, output → output`, (batch, heads, queries, width of values); where `before` widened the values, as
            with columns of zeros that a kernel needs, it may cut the output to the width that they had. To what acts
            after that, the values are cut alike.
        stack: only in this stack.
        layer: only in this block call.
        part: only this part: `self`, `cross`, `self.1`, …
        path: only calls that the module of this name makes.
        name: under which modules are registered.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such call or the name is taken. What can only be known in a forward is raised by
            it: a kernel that cannot be rewritten, tensors that do not fit.
    """
    if before is None and after is None:
        raise EditError("before= or after= is needed: there is nothing to rewrite.")
    places = _places(anatomy, stack, layer, part, path)
    added = [one for one in (before, after) if isinstance(one, nn.Module)]
    if added:
        refuse_wrapped(model, *added)

    def changes() -> Iterator[Callable[[], Change]]:
        for path, called in places.items():
            module = module_at(model, path)
            for suffix, one in (("before", before), ("after", after)):
                if isinstance(one, nn.Module):
                    yield lambda module=module, suffix=suffix, one=one: Added(module, f"{name}_{suffix}", one)  # type: ignore[misc]
            turns = Turns(len(called), in_one=len({(place.stack, place.layer) for place, _ in called}) == 1)
            around = _Rewrite(before, after, [place for place, _ in called], [meant for _, meant in called], turns)
            yield lambda around=around, module=module: Leased(around, module)  # type: ignore[misc]
            yield from enclosing(model, path, around, turns)

    meant = [place for called in places.values() for place, meant in called if meant]
    where = [f"{place.stack} layer {place.layer} {place.part} ({place.path})" for place in meant]
    numbers = {id(p): p.numel() for one in added for p in one.parameters()}
    return make("rewrite attention", where, changes(), sum(numbers.values()))


def replace_heads(
    model: nn.Module,
    anatomy: Anatomy,
    value: StateValue,
    *,
    heads: int | Sequence[int] | None = None,
    stack: str | None = None,
    layer: int | None = None,
    part: str | None = None,
) -> Edit:
    """Put something else in the place of what heads hand to the output projection: A_h V_h.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        value: what broadcasts to (batch, heads, queries, width), a number, or a function of the heads' outputs.
        heads: which; all by default.
        stack: only in this stack.
        layer: only in this block call.
        part: only this part: `self`, `cross`, …

    Returns:
        The handle.

    Raises:
        EditError: where there is no such call. A head that the call does not have is found at the first forward.
    """
    chosen = None if heads is None else [heads] if isinstance(heads, int) else list(heads)
    edit = rewrite_attention(model, anatomy, after=_Heads(chosen, value), stack=stack, layer=layer, part=part)
    which = "all heads" if chosen is None else "head " + ", ".join(map(str, chosen))
    edit.what = f"replace the output of {which}"
    return edit


class _Heads:
    def __init__(self, chosen: list[int] | None, value: StateValue) -> None:
        self._chosen, self._value = chosen, value

    def __call__(self, call: Call, output: Tensor) -> Tensor:
        path = call.place.path
        if self._chosen is None:
            return new_value(self._value, output, f"the output of the heads in {path}")
        number = output.shape[1]
        if any(not 0 <= head < number for head in self._chosen):
            raise EditError(f"heads={self._chosen}, but attention in {path} has heads 0 to {number - 1}.")
        new = new_value(self._value, output[:, self._chosen], f"the output of heads {self._chosen} in {path}")
        chosen = torch.tensor(self._chosen, device=output.device)
        return output.index_copy(1, chosen, new)


class _Rewrite:
    """Around the module that calls the kernel."""

    what = "rewrite attention"

    def __init__(
        self, before: Before | None, after: After | None, places: Sequence[Place], chosen: Sequence[bool], turns: Turns
    ) -> None:
        self.before, self.after = before, after
        self.places, self.chosen, self.turns = tuple(places), tuple(chosen), turns
        self.lease: Lease | None = None

    def take(self) -> Place | None:
        """The place of the next call; None where it is left as it is."""
        turn = self.turns.next()
        return self.places[turn] if self.chosen[turn] else None

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        self.turns.begin()
        path = self.places[0].path
        stream = stream_input(args, kwargs)
        layout = self.places[0].layout
        batch = None if stream is None else layout.sizes(stream.shape)[0]
        given = None if stream is None else layout.tokens(stream)
        heads = heads_of(forward.module)
        mode = Rewriting(self.before, self.after, self.take, path, batch, heads, given, forward.running)
        forward.running.append(mode)
        try:
            with mode:
                output = run(*args, **kwargs)
        finally:
            forward.running.pop()
        if mode.calls == 0:
            raise EditError(f"attention in {path} cannot be rewritten: no call of a kernel that is known was seen.")
        return output


def _places(
    anatomy: Anatomy, stack: str | None, layer: int | None, part: str | None, path: str | None
) -> dict[str, list[tuple[Place, bool]]]:
    """For each module that calls a kernel and is to be edited: the places of its calls, and which are meant."""
    found: dict[str, list[tuple[Place, bool]]] = {}
    for one in anatomy.stacks:
        wanted = one in chosen_stacks(anatomy, stack)
        layers = chosen_layers(one, layer) if wanted else []
        for index, (parts, callers) in enumerate(zip(one.calls, one.callers, strict=True)):
            for called, caller in zip(parts, callers, strict=True):
                place = place_in(one, index + 1, called, caller)
                meant = index + 1 in layers and part in (None, called) and path in (None, caller)
                found.setdefault(caller, []).append((place, meant))
    found = {caller: places for caller, places in found.items() if any(meant for _, meant in places)}
    if not found:
        asked = (("stack", stack), ("layer", layer), ("part", part), ("path", path))
        where = " ".join(f"{n}={v!r}" for n, v in asked if v is not None)
        raise EditError(f"no attention call was seen at {where or 'any place'} of this model.")
    return found


class Leased:
    """The dispatch table from which a module gets its kernel, redirected for as long as the edit is in force."""

    def __init__(self, around: _Rewrite, module: nn.Module) -> None:
        self._around = around
        around.lease = lease_for(module)

    def check(self) -> None:
        """It can always be given up."""

    def undo(self) -> None:
        """Give it up."""
        if self._around.lease is not None:
            self._around.lease.release()
            self._around.lease = None

    def leave(self) -> None:
        """Give it up: there is nothing to keep in it."""
        self.undo()
