"""Training a model that is only lent: whatever the steps did to it is taken back, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.errors import TrialError
from fullrank.spec.quiet import forked_rng

__all__ = ["lent", "reseeded"]


@contextmanager
def lent(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Train inside; afterwards the model and the process are as they were.

    The steps change the parameters where they are, so that edits of the model, functions that hold its modules and
    whatever else knows them by identity train along. Put back on leaving, whatever happened: values and version
    counters of parameters, and all that `capture.undisturbed` puts back (`.grad`, flags, buffers, the grad mode, random
    state), with the global generators of Python and NumPy. Costs one copy of the parameters.

    Inside, the model is in evaluation mode, `.grad` is empty, gradients are off and every global generator is seeded.

    Args:
        model: whose parameters are in memory, none of them sharded.
        seed: of the global generators, which dropout draws from.

    Yields:
        Nothing.

    Raises:
        TrialError: for parameters that are sharded, quantised or not in memory.
    """
    parameters = list(dict.fromkeys(model.parameters()))
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "device_mesh"):
            raise TrialError(f"{name} is not in memory here or is sharded; trials train plain models only.")
    with ExitStack() as put_back:
        put_back.enter_context(undisturbed(model))
        kept = [(p, p.detach().clone(), p._version) for p in parameters]
        put_back.callback(_restore, kept)
        put_back.enter_context(forked_rng(seed))
        reseeded(model, seed)
        for parameter in parameters:
            parameter.grad = None
        yield


def reseeded(model: nn.Module, seed: int) -> None:
    """Seed the generators that this model's dropout draws from; inside of `lent`, which puts them back."""
    import numpy as np

    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for device in {p.device for p in model.parameters()}:
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _restore(kept: list[tuple[nn.Parameter, Tensor, int]]) -> None:
    with torch.no_grad():
        for parameter, value, _ in kept:
            parameter.copy_(value)
    # a graph that the caller still holds has saved these values, and they are these values again
    parameters, versions = tuple(p for p, _, _ in kept), tuple(version for _, _, version in kept)
    if parameters:
        torch._C._autograd._unsafe_set_version_counter(parameters, versions)
