"""Going back through a forward that has just run: what to differentiate, and the gradients of parameters.

No `.grad` is read or written: gradients are asked for by `torch.autograd.grad`, reduced as they arrive, and dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.gradients import End

__all__ = ["awake", "own_loss", "parameter_gradients", "projected_ends", "projection", "without_gradient"]

Take = Callable[[str, Tensor], None]
"""Called with a parameter's name and its gradient, which is dropped afterwards."""


def own_loss(output: Any) -> Tensor | None:
    """The loss in what a model returned: `.loss`, `["loss"]`, a single number, or a single number as the first item.

    Args:
        output: what the model returned.

    Returns:
        A tensor of one entry with a history, or None where there is none.
    """
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and not isinstance(output, Mapping):
        found = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(found, Tensor) and found.numel() == 1 and found.ndim <= 1:
        return found if found.is_floating_point() and found.requires_grad else None
    return None


def projected_ends(ends: Sequence[End]) -> tuple[list[End], list[str]]:
    """The last states to be projected: those of stacks that feed no other stack.

    Args:
        ends: the last states of all stacks.

    Returns:
        The chosen ones, and sentences about those that cannot be used.
    """
    notes = []
    chosen = []
    for end in ends:
        if end.into:
            continue
        if end.stack.layout.tokens(end.value.detach()) is None:
            notes.append(f"the last state of {end.stack.name} was not projected: which axis holds tokens is not known.")
        elif end.version != end.value._version:
            notes.append(f"the last state of {end.stack.name} was not projected: the model has overwritten it.")
        else:
            chosen.append(end)
    return chosen, notes


def projection(end: End, *, seed: int, probe: int = 0, first: int = 0) -> Tensor:
    """Standard normal numbers on the real tokens of a last state, zero on the others, in the layout of the state.

    Each sequence's numbers depend on the seed, the probe, the stack and its own place among all sequences, so that a
    batch and its halves give the same.

    Args:
        end: the state.
        seed: of all probes.
        probe: which one.
        first: place of the batch's first sequence among all sequences.

    Returns:
        What the state is multiplied with, entry by entry, before all is summed.
    """
    tokens = end.stack.layout.tokens(end.value.detach())
    assert tokens is not None
    sequences, length, width = tokens.shape
    generator = torch.Generator()
    G = torch.empty(sequences, length, width)
    for index in range(sequences):
        told = f"{seed} {probe} {end.stack.name} {first + index}".encode()
        generator.manual_seed(int.from_bytes(hashlib.blake2b(told, digest_size=7).digest()))
        G[index].normal_(generator=generator)
    if end.real is not None:
        G[~end.real.cpu()] = 0.0
    G = G.to(device=tokens.device, dtype=tokens.dtype)
    return end.stack.layout.back(G, end.value)


def parameter_gradients(
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    take: Take,
    *,
    through: Sequence[Tensor] = (),
    retain_graph: bool = False,
) -> list[str]:
    """One backward: the gradient of Σ outputs · weights with respect to every parameter, one after the other.

    Each gradient is handed on as soon as it is complete and dropped at once, so that they are never all there together.
    `.grad` is not touched, and hooks that run when a gradient has been accumulated are not called.

    Args:
        outputs: what is differentiated.
        weights: of the same shapes.
        parameters: by name; all of them require gradients.
        take: gets the gradients.
        through: other tensors that gradients must reach, such as first states that no parameter comes before.
        retain_graph: whether there will be another backward.

    Returns:
        Names of the parameters that the outputs do not depend on.
    """
    reached: set[str] = set()

    def drop(name: str, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        reached.add(name)
        with torch.no_grad():
            take(name, gradient.to_dense() if gradient.is_sparse else gradient)
            if gradient.layout != torch.strided:
                return None
            return gradient.new_zeros(()).expand(gradient.shape)  # one number in place of the whole gradient

    with ExitStack() as put_back:
        for name, parameter in parameters.items():
            put_back.callback(parameter.register_hook(partial(drop, name)).remove)
        wanted = [*parameters.values(), *through]
        torch.autograd.grad(
            list(outputs), wanted, grad_outputs=list(weights), retain_graph=retain_graph, allow_unused=True
        )
    return [name for name in parameters if name not in reached]


def without_gradient(parameter: nn.Parameter) -> str:
    """Why a parameter can have no gradient, or an empty sentence."""
    if parameter.is_meta:
        return "its values are not in memory (offloaded)"
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"it is quantised: {str(parameter.dtype).removeprefix('torch.')} has no gradients"
    if parameter.is_inference():
        return "it was made in inference mode"
    return ""


@contextmanager
def awake(model: nn.Module) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, str]]]:
    """Inside, frozen parameters require gradients too; afterwards they are as they were.

    That costs memory for the activations that their gradients need.

    Args:
        model: the model.

    Yields:
        The parameters that require gradients inside, by their first name, and why the others do not.
    """
    asleep: dict[str, str] = {}
    live: dict[str, nn.Parameter] = {}
    with ExitStack() as put_back:
        for name, parameter in model.named_parameters():
            reason = without_gradient(parameter)
            if not reason and not parameter.requires_grad:
                reason = _wake(parameter, put_back)
            if reason:
                asleep[name] = reason
            else:
                live[name] = parameter
        yield live, asleep


def _wake(parameter: nn.Parameter, put_back: ExitStack) -> str:
    try:
        parameter.requires_grad_()
    except (RuntimeError, NotImplementedError):  # tensors of a class of their own, such as packed weights
        return f"it is frozen, and a {type(parameter.data).__name__} cannot be differentiated"
    put_back.callback(parameter.requires_grad_, False)
    return ""
