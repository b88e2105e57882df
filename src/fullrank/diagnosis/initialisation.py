"""The same architecture at its own random initialisation, without touching the model or anybody's random numbers."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullrank.capture.weights import form_of
from fullrank.capture.wrappers import is_sharded, library_class
from fullrank.diagnosis.free_memory import free_memory
from fullrank.diagnosis.rebuilding import rebuilt
from fullrank.diagnosis.resetting import HOOKS, CannotReset, others, reset_copy
from fullrank.spec.quiet import forked_rng, quiet

__all__ = ["Initialised", "base_parameters", "reinitialised"]

_UNKNOWN_MEMORY = 8 * 2**30  # bytes of weights that are copied where nobody can tell how much memory is free


@dataclass(frozen=True, eq=False)
class Initialised:
    """A reference, or why there is none.

    Attributes:
        model: the same architecture at its own random initialisation, in evaluation mode; None where there is none.
        how: one sentence: how it was made, or why it was not.
    """

    model: nn.Module | None
    how: str


def reinitialised(model: nn.Module, *, seed: int) -> Initialised:
    """The same architecture at its own random initialisation: same dtypes, same device, in evaluation mode.

    A Hugging Face model is built anew from a copy of its configuration, under the same attention kernels; where that
    gives other parameters than the model has (layers were cut, the constructor takes more), a deep copy is reset module
    by module (see `resetting.reset_copy`). Any other model is made again by its class where it holds every argument of
    its constructor (see `rebuilding.rebuilt`), else reset likewise. Buffers are the constructor's or the copy's, with
    running statistics reset. Hooks that others have registered are left out.

    Cost: the memory of a second copy of the weights, refused where that is more than half of what is free; a draw of
    every weight, on the model's own device where that is the CPU or a CUDA device. Which numbers a seed gives depends
    on that device.

    Args:
        model: any module, without wrappers (see `capture.wrappers.bare`); nothing about it is changed.
        seed: of the draws. Another one than the weights were drawn with, or the reference is the model itself.

    Returns:
        The reference, or why there is none.
    """
    reason = _refusal(model)
    if reason:
        return _none(reason)
    with forked_rng(seed), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        base, adapted = _base(model)
        if _of_transformers(base):
            built = _from_configuration(base, device, adapted=adapted)
            if built is not None:
                without = ", without its adapters" if adapted else ""
                how = f"{type(base).__name__} built anew from its configuration{without}, seed {seed}"
                return _made(built, model, how)
        if adapted:
            return _none(f"{type(base).__name__} has adapters, and cannot be built from a configuration without them")
        anew = None if _of_transformers(base) else rebuilt(model, _place(device), seed=seed)
        if anew is not None:
            return _made(_fitted(anew[0], model, device), model, f"{anew[1]}, seed {seed}")
        try:
            twin, how = reset_copy(model, _place(device))
        except CannotReset as why:
            return _none(str(why))
        return _made(twin if _place(device) == device else twin.to(device), model, f"{how}, seed {seed}")


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; of a model with adapters, those of what is adapted, by the names they have without."""
    base, adapted = _base(model)
    named = {name.replace("_orig_mod.", ""): parameter for name, parameter in base.named_parameters()}
    if adapted:  # as the PEFT package calls what its layers stand for
        named = {name.replace(".base_layer.", ".").replace(".original_module.", "."): p for name, p in named.items()}
    return named


def _none(reason: str) -> Initialised:
    return Initialised(None, f"no reference at initialisation: {reason}.")


def _made(twin: nn.Module, model: nn.Module, how: str) -> Initialised:
    modules = list(model.modules())
    found = {
        "hook": sum(len(others(getattr(module, name))) for module in modules for name in HOOKS),
        "replaced forward": sum("forward" in vars(module) and not hasattr(module, "_hf_hook") for module in modules),
    }
    left = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in found.items() if count]
    without = f", without the {' and '.join(left)} that others have put on the model" if left else ""
    return Initialised(twin.eval(), f"{how}{without}.")


# ---------------------------------------------------------------- refusals


def _refusal(model: nn.Module) -> str:
    """Why there can be no reference; empty where there may be one."""
    parameters = list(model.parameters())
    if not parameters:
        return f"{type(model).__name__} has no parameters"
    if is_sharded(model) or any(hasattr(parameter, "device_mesh") for parameter in parameters):
        return "its parameters are sharded over processes"
    if any(parameter.is_meta for parameter in parameters):
        return "some of its weights are offloaded, or on the meta device"
    forms = [form for p in parameters if not p.is_complex() and (form := form_of(p))]
    packed = library_class("torch.ao.nn.quantized.modules.utils", "WeightedQuantizedModule")
    if forms or any(isinstance(module, packed) for module in model.modules()):
        return f"its weights are quantised ({forms[0] if forms else 'packed'}), and initialisations draw none of these"
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        return f"its weights lie on several devices ({', '.join(sorted(map(str, devices)))})"
    if _learned_tokens(model):
        return "an adapter puts learned tokens before every sequence, and without it sequences have other lengths"
    return _no_room(sum(p.numel() * p.itemsize for p in parameters), next(iter(devices)))


def _no_room(needed: int, device: torch.device) -> str:
    free = free_memory(device)
    most = _UNKNOWN_MEMORY if free is None else free // 2
    if needed <= most:
        return ""
    what = "is allowed where free memory is not known" if free is None else f"is half of the free memory on {device}"
    return f"a second copy of its weights takes {needed / 2**30:.3g} GiB, and {most / 2**30:.3g} GiB {what}"


def _learned_tokens(model: nn.Module) -> bool:
    if not isinstance(model, library_class("peft", "PeftModel")):
        return False
    wrapped: Any = model
    return bool(wrapped.active_peft_config.is_prompt_learning)


# ---------------------------------------------------------------- from a configuration


def _base(model: nn.Module) -> tuple[nn.Module, bool]:
    """What adapters are on, and whether there are any."""
    wrapped: Any = model
    if isinstance(model, library_class("peft", "PeftModel")):
        return wrapped.get_base_model(), True
    layer = library_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    return model, any(isinstance(module, layer) for module in model.modules())


def _of_transformers(module: nn.Module) -> bool:
    return isinstance(module, library_class("transformers.modeling_utils", "PreTrainedModel"))


def _from_configuration(base: nn.Module, device: torch.device, *, adapted: bool) -> nn.Module | None:
    """A model of the same class and configuration; None where it cannot be built, or has other parameters."""
    known: Any = base
    try:
        with quiet(), _place(device):
            twin: nn.Module = type(known)._from_config(copy.deepcopy(known.config), dtype=known.dtype)
    except Exception:  # noqa: BLE001 - constructors raise what they like; then a copy is reset
        return None
    theirs, mine = base_parameters(base), dict(twin.named_parameters())
    fits = all(name in theirs and theirs[name].shape == parameter.shape for name, parameter in mine.items())
    if not fits or (len(mine) < len(theirs) and not adapted):
        return None
    return _fitted(twin, base, device)


def _place(device: torch.device) -> torch.device:
    """Where weights are drawn: on devices whose random state is not kept here, none are."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _fitted(twin: nn.Module, base: nn.Module, device: torch.device) -> nn.Module:
    """The twin on the device of the model, every tensor of it in the dtype that it has there."""
    theirs = base_parameters(base)
    twin.to(device)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.data = parameter.data.to(theirs[name].dtype)
        for name, buffer in base.named_buffers():
            _cast_buffer(twin, name, buffer.dtype)
    return twin


def _cast_buffer(twin: nn.Module, name: str, dtype: torch.dtype) -> None:
    path, _, last = name.rpartition(".")
    try:
        held = twin.get_submodule(path)._buffers.get(last)
    except AttributeError:
        return  # of a module that adapters have added
    if held is not None and held.is_floating_point() and dtype.is_floating_point:
        twin.get_submodule(path)._buffers[last] = held.to(dtype)
