"""The record of what was repaired: in the model, in its `state_dict`, in its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.wrappers import bare
from fullrank.edit.forwards import edits_in
from fullrank.errors import RemedyError
from fullrank.spec.repairs import REPAIRS

__all__ = ["KEY", "Entry", "Recorded", "decoded", "named_alone", "prefix_in_weights", "record_in_weights", "repairs_in"]

KEY = REPAIRS
"""Name of the buffer in `state_dict()` and of the field in a configuration."""

Entry = dict[str, Any]
"""`name`, `parameters` and whether it is `structural`."""

_WRAPPERS = ("module", "_orig_mod")

_OWN = "_fullrank_repairs"  # beside the model's modules; a copy of the model takes it along


def repairs_in(model: nn.Module) -> list[Entry]:
    """What is in force in a model, also in a copy of a repaired one: name and parameters of each remedy, in order."""
    return list(bare(model).__dict__.get(_OWN, ()))


def record_in_weights(weights: Mapping[str, Tensor]) -> list[Entry]:
    """The structural repairs that a `state_dict` or a safetensors file was saved with; none where it has no record."""
    found = [value for name, value in weights.items() if name == KEY or name.endswith(f".{KEY}")]
    return decoded(found[0]) if found else []


def prefix_in_weights(weights: Mapping[str, Tensor]) -> str:
    """What wrappers have put before the names of a `state_dict` with a record: `module.`, `_orig_mod.`, or nothing."""
    found = next((name[: -len(KEY)] for name in weights if name.endswith(KEY)), "")
    return found if set(found.split(".")) <= {*_WRAPPERS, ""} else ""


def named_alone(model: nn.Module) -> list[str]:
    """Structural repairs that a model's configuration names and that are not in force in it.

    So it is where a plain model was made from the configuration of a repaired one. Parts of repaired models share its
    configuration: where anything in the model is changed, nothing is said.

    Args:
        model: the model.

    Returns:
        Names.
    """
    entries = getattr(getattr(bare(model), "config", None), KEY, None)
    if not isinstance(entries, list) or edits_in(model) or any(_added(module) for module in model.modules()):
        return []
    return [str(one.get("name")) for one in entries if isinstance(one, dict) and one.get("structural")]


def _added(module: nn.Module) -> bool:
    names = (*module._parameters, *module._buffers, *module._modules)
    return _OWN in module.__dict__ or any(name.startswith("fullrank_") for name in names)


def decoded(tensor: Tensor) -> list[Entry]:
    """Read the buffer.

    Returns:
        The entries.

    Raises:
        RemedyError: where it is none of ours.
    """
    try:
        entries = json.loads(bytes(tensor.to("cpu", torch.uint8).tolist()))
    except ValueError:
        entries = None
    fields = {"name": str, "parameters": dict, "structural": bool}
    if not isinstance(entries, list) or not all(
        isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in fields.items())
        for one in entries
    ):
        raise RemedyError(f"{KEY} in the weights is no record of repairs.")
    return entries


class Recorded:
    """The record of repairs in one model, in force. A change like those of `edit`: it can be taken back.

    Structural repairs stand in `state_dict()` as a buffer of bytes, so that whatever saves the weights saves what is
    needed to load them; and loading weights that were saved with other repairs, or with none, is refused in a sentence.
    Configurations that are saved with a model (those of Hugging Face) name all repairs.

    Args:
        model: the model.
        entries: what is to be recorded beside what stands there.
    """

    def __init__(self, model: nn.Module, entries: Sequence[Entry]) -> None:
        self._model = bare(model)
        self._before = repairs_in(model)
        self._now = [*self._before, *entries]
        self._write(self._now)

    def check(self) -> None:
        """It can always be taken back."""

    def undo(self) -> None:
        """Put the record back that stood there before."""
        self._write(self._before)

    def leave(self) -> None:
        """The same: what is left of a repair in trained weights needs no record to be loaded."""
        self.undo()

    def _write(self, entries: Sequence[Entry]) -> None:
        model = self._model
        config = getattr(model, "config", None)
        saved = config if hasattr(config, "to_dict") else None
        for holder, name in ((model.__dict__, _OWN), (getattr(saved, "__dict__", {}), KEY)):
            holder.pop(name, None)
        if KEY in model._buffers:
            delattr(model, KEY)
        for number, hook in list(model._load_state_dict_pre_hooks.items()):
            if isinstance(getattr(hook, "hook", hook), _Compared):
                del model._load_state_dict_pre_hooks[number]
        if not entries:
            return
        model.__dict__[_OWN] = list(entries)
        if saved is not None:
            saved.__dict__[KEY] = list(entries)
        structural = [one for one in entries if one["structural"]]
        if structural:
            model.register_buffer(KEY, torch.tensor(list(json.dumps(structural).encode()), dtype=torch.uint8))
            model.register_load_state_dict_pre_hook(_Compared(structural))


class _Compared:
    """Before weights are loaded into a repaired model: were they saved with the same repairs?"""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = list(entries)

    def __call__(self, module: nn.Module, weights: Mapping[str, Tensor], prefix: str, *others: Any) -> None:
        found = decoded(weights[prefix + KEY]) if prefix + KEY in weights else []
        if found == self._entries:
            return
        mine, theirs = (", ".join(one["name"] for one in each) for each in (self._entries, found))
        if mine == theirs:
            mine, theirs = (json.dumps([one["parameters"] for one in each]) for each in (self._entries, found))
        saved = f"with the repairs {theirs}" if theirs else "without repairs"
        raise RemedyError(
            f"these weights were saved {saved} and this model is repaired with {mine}: undo its repairs, or load the "
            "weights before it is repaired."
        )
