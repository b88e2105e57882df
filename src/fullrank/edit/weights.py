"""Edits of weights: other values in a parameter, or a function in front of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fullrank.capture.wrappers import bare
from fullrank.edit.fitting import broadcasts
from fullrank.edit.handle import Edit, Ordered, make
from fullrank.edit.places import modules_by_name
from fullrank.edit.registered import refuse_wrapped
from fullrank.errors import EditError

__all__ = ["reparametrize", "replace_weight"]


def replace_weight(model: nn.Module, name: str, value: Tensor | float | Callable[[Tensor], Tensor]) -> Edit:
    """Write other values into a parameter or a buffer; undoing writes the old bits back into the same object.

    The parameter stays the object it was, so that optimisers, hooks, ties, compiled graphs, DDP and `state_dict` see
    the new values and nothing else changes. The old values are kept meanwhile: one more copy of the tensor. They are
    put back whatever happened to the parameter since; edits of one tensor are undone in reverse order.

    Args:
        model: the model.
        name: as in `named_parameters()` or `named_buffers()`.
        value: what broadcasts to it, or a function of its present values.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such tensor, or the value does not fit it.
    """
    tensor = _tensor(model, name)
    with torch.no_grad():
        new = value(tensor.detach().clone()) if callable(value) else torch.as_tensor(value)
        if new.is_complex() != tensor.is_complex() or not broadcasts(new.shape, tensor.shape):
            raise EditError(f"{name} is {tuple(tensor.shape)}, and the value for it is {tuple(new.shape)}.")
    holder = modules_by_name(model)[name.rpartition(".")[0]]
    return make("replace the values", [name], [lambda: _Values(holder, name, tensor, new)])


def reparametrize(model: nn.Module, name: str, function: nn.Module) -> Edit:
    """Let a weight be a function of the parameter: W = f(V), computed whenever it is used.

    By `torch.nn.utils.parametrize`: V stays the parameter object that it was, under the name
    `….parametrizations.<name>.original` in `state_dict`, and parameters of f are parameters of the model. Undoing puts
    V back under its name, in its place among the module's parameters, with the values that it has then.

    Args:
        model: the model.
        name: as in `named_parameters()`.
        function: a module that makes a tensor of the same shape and type.

    Returns:
        The handle.

    Raises:
        EditError: where there is no such parameter, several modules share it, or f changes its shape.
    """
    parameter = _tensor(model, name, parametrized=True)
    path, _, last = name.rpartition(".")
    module = modules_by_name(model)[path]
    if not isinstance(parameter, nn.Parameter):
        raise EditError(f"{name} is a buffer; only parameters can be reparametrised.")
    owners = [owner for owner in model.modules() for own in owner._parameters.values() if own is parameter]
    if len(owners) > 1:
        raise EditError(
            f"{name} is shared by {len(owners)} modules; a function in front of one of them would untie it."
        )
    numbers = sum(p.numel() for p in function.parameters())
    if numbers:
        refuse_wrapped(model, function)
    return make("reparametrise", [name], [lambda: _Parametrized(module, last, name, function)], numbers)


class _Values(Ordered):
    only_values = True

    def __init__(self, holder: nn.Module, name: str, tensor: Tensor, new: Tensor) -> None:
        self._holder, self._name, self._tensor = holder, name, tensor
        self._old = tensor.detach().clone()
        self._key = id(tensor)
        _LIVE.setdefault(self._key, []).append(weakref.ref(self))
        weakref.finalize(self, _forget, self._key)
        with torch.no_grad():
            tensor.copy_(new)

    def check(self) -> None:
        """Refuse where the tensor was edited again since.

        Raises:
            EditError: in that case.
        """
        mine = _in_force(self._key)
        if self in mine and any(later not in self.beside for later in mine[mine.index(self) + 1 :]):
            raise EditError(f"the values of {self._name} were replaced again since; undo that first.")

    def undo(self) -> None:
        """Write the old values back: into the tensor that stands there now, where others put another in its place."""
        last = self._name.rpartition(".")[2]
        there = self._holder._parameters.get(last, self._holder._buffers.get(last))
        with torch.no_grad():
            for tensor in {id(one): one for one in (self._tensor, there) if one is not None}.values():
                if tensor.shape == self._old.shape and not tensor.is_meta:
                    tensor.copy_(self._old)
        self.leave()

    def leave(self) -> None:
        """Forget the old values."""
        _LIVE[self._key] = [ref for ref in _LIVE.get(self._key, []) if ref() is not self]
        _forget(self._key)


_LIVE: dict[int, list[weakref.ref[_Values]]] = {}
"""Edits of values in force, by tensor, which each of them holds. One whose handle is gone can never be undone."""


def _in_force(key: int) -> list[_Values]:
    return [one for ref in _LIVE.get(key, ()) if (one := ref()) is not None]


def _forget(key: int) -> None:
    found = [ref for ref in _LIVE.get(key, ()) if ref() is not None]
    if found:
        _LIVE[key] = found
    else:
        _LIVE.pop(key, None)


class _Parametrized:
    def __init__(self, module: nn.Module, last: str, name: str, function: nn.Module) -> None:
        self._module, self._last, self._name, self._function = module, last, name, function
        self._order = list(module._parameters)
        try:
            parametrize.register_parametrization(module, last, function)
        except (ValueError, RuntimeError) as reason:
            raise EditError(f"{name} cannot be reparametrised: {reason}") from None

    def check(self) -> None:
        """Refuse where the parametrization was taken away by others.

        Raises:
            EditError: in that case.
        """
        if not parametrize.is_parametrized(self._module, self._last) or self._place() is None:
            raise EditError(f"the parametrization of {self._name} is not there any more: it was taken away by others.")

    def undo(self) -> None:
        """Take the function away, and all of the machinery with the last one."""
        found = self._module.parametrizations[self._last]  # type: ignore[index]
        if len(found) > 1:
            place = self._place()
            assert place is not None
            del found[place]  # type: ignore[union-attr]
            return
        parametrize.remove_parametrizations(self._module, self._last, leave_parametrized=False)
        own = self._module._parameters
        for each in [each for each in self._order if each in own]:
            own[each] = own.pop(each)

    def leave(self) -> None:
        """Let the parameter have the value that the function makes of it, and take the function away.

        Raises:
            EditError: where another function comes before this one.
        """
        found = self._module.parametrizations[self._last]  # type: ignore[index]
        if self._place() != 0:
            raise EditError(
                f"{self._name} was reparametrised before: its present value cannot be kept while that is in force; "
                "leave or undo that first."
            )
        original = found.original  # type: ignore[union-attr]
        flags = [(part, part.training) for part in self._function.modules()]
        self._function.eval()  # a power iteration would take a step when it is asked
        with torch.no_grad():
            original.copy_(self._function(original))
        for part, training in flags:
            part.training = training
        self.undo()

    def _place(self) -> int | None:
        found = self._module.parametrizations[self._last]  # type: ignore[index]
        return next((place for place, one in enumerate(found) if one is self._function), None)


def _tensor(model: nn.Module, name: str, *, parametrized: bool = False) -> Tensor:
    path, _, last = name.rpartition(".")
    module = modules_by_name(model).get(path)
    found = None if module is None else module._parameters.get(last, module._buffers.get(last))
    if found is None and module is not None and parametrize.is_parametrized(module, last):
        if not parametrized:
            raise EditError(f"{name} is made by a parametrisation and has no values of its own to be replaced.")
        found = module.parametrizations[last].original  # type: ignore[index, union-attr]
    if found is not None and found.is_meta:
        raise EditError(f"{name} is offloaded: its values are not there to be changed.")
    if found is None:
        raise EditError(f"{name!r} is no parameter or buffer of this {type(bare(model)).__name__}.")
    return found
