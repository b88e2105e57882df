"""Looking at a model without leaving a trace on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fullrank.capture.wrappers import is_sharded

__all__ = ["batch_norms", "undisturbed"]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules that normalise with statistics of a batch in training and with running ones in evaluation."""
    kind = nn.modules.batchnorm._NormBase
    return [module for module in model.modules() if isinstance(module, kind) and module.track_running_stats]


@contextmanager
def undisturbed(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards everything as it was, whatever happened in between.

    Put back on leaving, in reverse order, also after an exception or an interrupt: the random state of the CPU and of
    every device the model is on, each module's own training flag, buffers (their objects and their values),
    `requires_grad` and `.grad` of every parameter, which weights are gathered from other processes or offloaded, the
    grad mode and the warning filters. Cost: a copy of the buffers and one comparison.

    Args:
        model: the model that is looked at inside.
        batch_statistics: batch norms normalise with the mean and variance of the batch they are given, as in training,
            and not with their running ones; these are buffers and put back too. Everything else stays in evaluation
            mode.

    Yields:
        Nothing.
    """
    with ExitStack() as put_back:
        put_back.enter_context(warnings.catch_warnings())
        # said by activation checkpointing of every forward without gradients, which is what this is for
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        _keep_random_state(model, put_back.callback)
        _keep_training_flags(model, put_back.callback)
        _keep_parameters(model, put_back.callback)
        _keep_buffers(model, put_back.callback)
        _keep_shards(model, put_back.callback)
        _keep_offloaded(model, put_back.callback)
        model.eval()
        for module in batch_norms(model) if batch_statistics else ():
            module.training = True  # never train(): a module inside would follow
        put_back.enter_context(torch.no_grad())
        yield


Later = Callable[[Callable[[], None]], object]


def _keep_random_state(model: nn.Module, later: Later) -> None:
    cpu = torch.get_rng_state()
    later(lambda: torch.set_rng_state(cpu))
    for device in {tensor.device for tensor in (*model.parameters(), *model.buffers())}:
        module = getattr(torch, device.type, None)
        if device.type in ("cpu", "meta") or not hasattr(module, "get_rng_state"):
            continue
        where = () if device.type == "mps" else (device,)  # there is one of them
        state = module.get_rng_state(*where)  # type: ignore[union-attr]
        later(partial(module.set_rng_state, state, *where))  # type: ignore[union-attr]


def _keep_training_flags(model: nn.Module, later: Later) -> None:
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in flags:
            module.training = training  # never train(): it would wake frozen submodules

    later(restore)


def _keep_parameters(model: nn.Module, later: Later) -> None:
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad, grad in states:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad

    later(restore)


def _keep_shards(model: nn.Module, later: Later) -> None:
    # the outermost sharded module keeps its weights gathered after a forward, which would be one more trace
    whole: set[int] = set()
    for module in reversed([*model.modules()]) if is_sharded(model) else ():
        own = [parameter for parameter in module.parameters() if id(parameter) not in whole]
        if not hasattr(module, "reshard"):
            continue
        whole.update(map(id, own))
        if all(hasattr(parameter, "device_mesh") for parameter in own):
            later(module.reshard)  # type: ignore[arg-type]


def _keep_offloaded(model: nn.Module, later: Later) -> None:
    # a forward that ends early leaves the weights in memory that it had just fetched
    away = [
        (module._parameters, name, parameter)
        for module in model.modules()
        if hasattr(module, "_hf_hook")
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]

    def restore() -> None:
        for held, name, parameter in away:
            now = held[name]
            if now is None or not now.is_meta:
                held[name] = parameter

    later(restore)


def _keep_buffers(model: nn.Module, later: Later) -> None:
    kept = [
        (module, dict(module._buffers), {name: _copy(buffer) for name, buffer in module._buffers.items()})
        for module in model.modules()
        if module._buffers
    ]

    def restore() -> None:
        with torch.no_grad():
            for module, objects, values in kept:
                module._buffers.clear()
                module._buffers.update(objects)
                for name, value in values.items():
                    buffer = objects[name]
                    if buffer is not None and value is not None and not _same(buffer, value):
                        _put_back(buffer, value)

    later(restore)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or buffer.is_meta else buffer.detach().clone()


def _same(buffer: Tensor, value: Tensor) -> bool:
    # by value: version counters miss writes through `.data`, and tensors made in inference mode have none. Not simply
    # always put back: a write makes autograd refuse a graph that has saved the buffer.
    if _layout(buffer) != _layout(value):
        return False
    try:
        return torch.equal(buffer, value)
    except RuntimeError:
        return False  # a dtype without comparison


def _put_back(buffer: Tensor, value: Tensor) -> None:
    with torch.inference_mode() if buffer.is_inference() else nullcontext():  # elsewhere they refuse writes
        if _layout(buffer) == _layout(value):
            buffer.copy_(value)
        else:
            buffer.data = value


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout
