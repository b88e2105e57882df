"""How the weights of a model are held, in sentences for the reader of a report."""

from __future__ import annotations

import torch
from torch import nn

from fullrank.capture.adapters import adapters
from fullrank.capture.weights import form_of
from fullrank.capture.wrappers import library_class

__all__ = ["held"]


def held(model: nn.Module) -> list[str]:
    """What is particular about a model's weights and about the precision it runs in.

    Args:
        model: the model.

    Returns:
        One sentence each for adapters, offloaded weights, quantised weights and autocast; none for a plain model.
    """
    return [*adapters(model), *_offloaded(model), *_quantised(model), *_autocast(model)]


def _offloaded(model: nn.Module) -> list[str]:
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return []
    away = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters() if parameter.is_meta)
    if not away:
        return []
    return [f"offloaded: {_size(away)} of weights were fetched layer by layer in every forward, and put away again."]


def _quantised(model: nn.Module) -> list[str]:
    kind = library_class("torch.ao.nn.quantized.modules.utils", "WeightedQuantizedModule")
    packed = sum(isinstance(module, kind) for module in model.modules())
    forms: dict[str, int] = {}
    for parameter in model.parameters():
        form = form_of(parameter)
        if form:
            forms[form] = forms.get(form, 0) + 1
    said = []
    if packed:
        said.append(
            f"quantised: the weights of {packed} modules are packed, no parameters, and nothing is said of them."
        )
    if forms:
        stored = " and ".join(f"{count} weights as {form}" for form, count in sorted(forms.items()))
        said.append(f"quantised: {stored}; activations and attention are those of the model's own kernels.")
    return said


def _autocast(model: nn.Module) -> list[str]:
    device = next((parameter.device.type for parameter in model.parameters() if not parameter.is_meta), "cpu")
    try:
        if not torch.is_autocast_enabled(device):
            return []
        dtype = torch.get_autocast_dtype(device)
    except RuntimeError:
        return []  # a device without autocast
    return [f"under autocast: matrix products and attention were computed in {str(dtype).removeprefix('torch.')}."]


def _size(count: int) -> str:
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count} bytes"
