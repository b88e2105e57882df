"""The blocks of a vision transformer whose tokens may become fewer, and which of its tokens are patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import Stack, undisturbed
from fullrank.capture.wrappers import bare
from fullrank.edit import Call, replace_stream, rewrite_attention
from fullrank.errors import RemedyError
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.tokens.patch_grid import is_image

__all__ = ["Vision", "placed_inside", "vision_of"]


@dataclass(frozen=True)
class Vision:
    """A stack of plain blocks over the patches of images.

    Attributes:
        stack: its name.
        depth: block calls.
        sites: the modules that attend.
        images: in the batch.
        tokens: of an image, before the first block.
        protected: of these, how many come first and are no patches.
        width: of the stream.
        mlp_ratio: numbers in the matrices of the first block's MLP, over 2·width².
    """

    stack: str
    depth: int
    sites: tuple[Site, ...]
    images: int
    tokens: int
    protected: int
    width: int
    mlp_ratio: float


def vision_of(patient: Patient, protected: int | None = None) -> Vision:
    """Look at a model.

    Args:
        patient: the model.
        protected: tokens that are no patches; by default those at the beginning that are the same for all images.

    Returns:
        What was found.

    Raises:
        RemedyError: where it does not read images, or its blocks are none that could go on with fewer tokens.
    """
    name = type(bare(patient.model)).__name__
    stack = _stack(patient)
    if stack is None:
        raise RemedyError(
            f"{name} reads no images, or no attention over their patches was seen: only those are reduced."
        )
    if stack.layout.axes != "tokens" or any(calls != ("self",) for calls in map(tuple, stack.calls)):
        raise RemedyError(f"the blocks of {stack.name} of {name} are not one attention each over a sequence of tokens.")
    sites = tuple(site for site in patient.self_attention if site.first.place.stack == stack.name)
    states = _two_images(patient, stack)
    look = _Look(tuple(states[0].shape[:2]))
    with rewrite_attention(patient.model, patient.anatomy, before=look, stack=stack.name), undisturbed(patient.model):
        patient.forward()
    if look.windows:
        raise RemedyError(f"attention of {name} is inside windows: their tokens cannot become fewer.")
    if look.placed:
        raise RemedyError(f"attention of {name} has a mask or a bias of positions, which would not fit fewer tokens.")
    if placed_inside(patient, stack, states[0]):
        raise RemedyError(
            f"the blocks of {name} answer otherwise where patches change places, as with rotary positions: fewer "
            "tokens would be taken for others."
        )
    same = (states[0] == states[1]).all(-1).all(0)
    first = int(same.long().cumprod(0).sum())
    if protected is None and bool(same[first:].any()):
        raise RemedyError(f"{name} has tokens that are no patches behind patches: only those before them are known.")
    protected = first if protected is None else protected
    images, tokens, width = states[0].shape
    if protected >= tokens:
        raise RemedyError(f"{name} has {tokens} tokens, and {protected} of them are protected: none is left to reduce.")
    return Vision(
        stack=stack.name,
        depth=len(stack.paths),
        sites=sites,
        images=images,
        tokens=tokens,
        protected=protected,
        width=width,
        mlp_ratio=_mlp_ratio(patient, stack, width),
    )


def _stack(patient: Patient) -> Stack | None:
    """The stack that reads images: where none is named so, the first that attends, of a model called with images."""
    stacks = patient.anatomy.stacks
    named = [one for one in stacks if one.name.split(".")[0] == "vision"]
    if named or not stacks:
        return named[0] if named else None
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend(is_image(one) for one in (*args, *kwargs.values()))

    with undisturbed(patient.model):
        hook = bare(patient.model).register_forward_pre_hook(look, with_kwargs=True)
        try:
            patient.forward()
        finally:
            hook.remove()
    return next((one for one in stacks if any(one.calls)), None) if any(seen) else None


class _Look:
    """Notes whether attention is over all tokens of the stream and nothing else.

    Args:
        sizes: (sequences, tokens) of the stream.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.windows = self.placed = False

    def __call__(self, call: Call) -> Call:
        rows = call.query if call.query is not None else call.logits
        assert rows is not None
        self.windows |= (rows.shape[0], call.queries) != self.sizes or call.queries != call.keys
        self.placed |= call.mask is not None or call.bias is not None or call.causal or call.window is not None
        return call


def placed_inside(patient: Patient, stack: Stack, X: Tensor) -> bool:
    """Whether what the blocks make of tokens depends on their order. Cost: two forwards.

    Args:
        patient: the model.
        stack: the blocks.
        X: the stream before the first of them.

    Returns:
        Whether tokens in another order come out otherwise than in that order.
    """
    order = torch.randperm(X.shape[1], generator=torch.Generator().manual_seed(0)).to(X.device)
    found: list[Tensor] = []
    read: list[tuple[Tensor, ...]] = []  # what attention compares shows positions also where little comes of them

    def look(call: Call) -> Call:
        if call.query is not None and call.key is not None:
            read[-1] = (*read[-1], call.query, call.key)
        return call

    for one in (X, X[:, order]):
        read.append(())
        with (
            undisturbed(patient.model),
            replace_stream(patient.model, patient.anatomy, one, stack=stack.name, layer=0),
            replace_stream(patient.model, patient.anatomy, _kept_in(found), stack=stack.name, layer=len(stack.paths)),
            rewrite_attention(patient.model, patient.anatomy, before=look, stack=stack.name),
        ):
            patient.forward()
    least = 0.05 if X.dtype.itemsize < 4 else 1e-4  # some softmax in float32 whatever they are
    pairs = [(found[0][:, order], found[1]), *((Y[..., order, :], Z) for Y, Z in zip(*read, strict=True))]
    return not all(bool((Z - Y).float().norm() <= least * Y.float().norm()) for Y, Z in pairs)


def _kept_in(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def keep(X: Tensor) -> Tensor:
        seen.append(X)
        return X

    return keep


def _two_images(patient: Patient, stack: Stack) -> list[Tensor]:
    """The stream before the first block for the images of the batch and for others."""
    seen: list[Tensor] = []

    def others(module: nn.Module, args: Any, kwargs: Any) -> Any:
        generator = torch.Generator().manual_seed(0)

        def other(one: Any) -> Any:
            if not is_image(one):
                return one
            return one + torch.randn(one.shape, generator=generator).to(one)

        return tuple(map(other, args)), {name: other(one) for name, one in kwargs.items()}

    with (
        undisturbed(patient.model),
        replace_stream(patient.model, patient.anatomy, _kept_in(seen), stack=stack.name, layer=0),
    ):
        patient.forward()
        hook = bare(patient.model).register_forward_pre_hook(others, with_kwargs=True)
        try:
            patient.forward()
        finally:
            hook.remove()
    return seen


def _mlp_ratio(patient: Patient, stack: Stack, width: int) -> float:
    parameters: dict[str, Callable[..., Any] | Tensor] = dict(bare(patient.model).named_parameters())
    names = {one.parameter for one in stack.weights[0] if one.role in ("up", "gate", "down") and not one.reason}
    found = [parameters[name] for name in names if name in parameters]
    numbers = sum(one.numel() for one in found if isinstance(one, Tensor))
    return numbers / (2 * width**2) if numbers else 4.0
