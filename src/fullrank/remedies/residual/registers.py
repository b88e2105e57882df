"""Registers: learned tokens beside the patches of an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import Stack, undisturbed
from fullrank.edit import Edit, replace_module, replace_stream, together
from fullrank.edit.at_block import given, with_state
from fullrank.edit.places import Place, place_in
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.branch_changes import fitted
from fullrank.remedies.tokens.vision import placed_inside

__all__ = ["Registers", "registers"]


class Registers(nn.Module):
    """Around the first block: tokens put behind those of the stream.

    Args:
        place: of the block.
        tokens: (registers, width), what they are at first.
    """

    def __init__(self, place: Place, tokens: Tensor) -> None:
        super().__init__()
        self.place = place
        self.tokens = nn.Parameter(tokens)

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the block returns for the longer stream."""
        X = self.place.stream(args, kwargs)
        more = self.tokens.to(X.dtype)
        if self.place.layout.tokens_first:
            longer = torch.cat([X, more[:, None].expand(-1, X.shape[1], -1)], 0)
        else:
            longer = torch.cat([X, more.expand(X.shape[0], -1, -1)], 1)
        return given(run, args, kwargs, X, longer)


class Dropped:
    """Around the last block: the stream without the last tokens.

    Args:
        place: of the block.
        number: of them.
    """

    def __init__(self, place: Place, number: int) -> None:
        self.place, self.number = place, number

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the block returns, shorter."""
        output = run(*args, **kwargs)
        state = self.place.state(output)
        axis = 0 if self.place.layout.tokens_first else 1
        return with_state(output, state.narrow(axis, 0, state.shape[axis] - self.number))


@remedy(
    "registers",
    "learned tokens beside the patches",
    addresses=("sinks",),
    acts_on="tokens",
    exactness="changes-function",
    formula="X ← [X; R] before the first block, X ← X without R after the last; R learned, N(0, std²) at first",
    papers=(
        "DINOv2 with registers; in Massive Activations in Large Language Models, released code "
        "locuslab/massive-activations",
    ),
    keys=("oversmoothing_fixes",),
    parameters=(
        Parameter("number", "of registers", 4, kind="integer", low=1, high=64),
        Parameter("std", "standard deviation of their entries at first", 0.02, low=0.0, high=10.0),
        Parameter("seed", "of the draw", 0, kind="integer", low=0, high=2**31),
    ),
    limits=(
        "For models of images whose blocks attend to all patches alike: with windows, masks, causal attention or "
        "positions inside the blocks the number of tokens is fixed, and they are refused.",
        "Hidden states that the model returns, and feature maps made of them, would have the further tokens: a model "
        "that returned them in the forward it was repaired with is refused, one that is asked for them later hands "
        "them on.",
        "Does not help before it is trained: until then registers are tokens that attention wastes weight on.",
        "In trained models with registers these can be replaced by their means.",
        "The paper of registers itself was not read.",
    ),
    cost="as many tokens more in every block; fused kernels stay; one vector per register",
)
def registers(patient: Patient, *, number: int = 4, std: float = 0.02, seed: int = 0) -> Edit:
    """Put learned tokens before the blocks, and take them away behind."""
    model, (stack, shapes) = patient.model, _images(patient)
    places = [place_in(stack, layer, "out", stack.paths[layer - 1]) for layer in (1, len(stack.paths))]
    drawn = torch.randn(number, stack.width, generator=torch.Generator().manual_seed(seed)) * std
    first = fitted(patient, stack.name, 1, Registers(places[0], drawn))

    def edits() -> Iterator[Edit]:
        yield replace_module(model, places[0].path, first, name="fullrank_registers")
        yield replace_module(model, places[1].path, Dropped(places[1], number))

    edit = together(edits())
    with edit.kept():
        try:
            with undisturbed(model):
                found = dict(_shapes(patient.forward()))
        except Exception as reason:
            said = next(iter(str(reason).splitlines()), type(reason).__name__)
            raise RemedyError(f"{type(model).__name__} does not run with more tokens: {said}") from reason
        other = next((name for name in {**shapes, **found} if shapes.get(name) != found.get(name)), None)
        if other is not None:
            raise RemedyError(
                f"{other or 'the output'} of {type(model).__name__} is {found.get(other)} with more tokens and "
                f"{shapes.get(other)} without them: what is made of states inside the blocks does not fit."
            )
    return edit


def _shapes(output: Any, name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors in what a model returns, with their shapes."""
    if isinstance(output, Tensor):
        yield name, tuple(output.shape)
        return
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, Mapping):
        parts: Iterable[tuple[Any, Any]] = output.items()
    elif isinstance(output, tuple | list):
        parts = zip(getattr(output, "_fields", range(len(output))), output, strict=True)
    else:
        return
    for key, part in parts:
        yield from _shapes(part, f"{name}.{key}" if name else str(key))


def _images(patient: Patient) -> tuple[Stack, dict[str, tuple[int, ...]]]:
    """The stack over patches of images.

    Returns:
        It, and the shapes of what the model returns.

    Raises:
        RemedyError: where there is none, or its blocks take no further tokens.
    """
    name = type(patient.model).__name__
    stack = next((one for one in patient.anatomy.stacks if one.name.split(".")[0] == "vision"), None)
    if stack is None:
        raise RemedyError(f"{name} reads no images: registers stand beside patches.")
    if stack.layout.axes != "tokens" or len(set(stack.paths)) < len(stack.paths):
        raise RemedyError(f"the blocks of {stack.name} of {name} hold no plain sequence of tokens, or share a module.")
    states: list[Tensor] = []

    def look(X: Tensor) -> Tensor:
        states.append(X)
        return X

    with undisturbed(patient.model), replace_stream(patient.model, patient.anatomy, look, stack=stack.name, layer=0):
        shapes = dict(_shapes(patient.forward()))
    for site in patient.self_attention:
        for call in site.calls:
            if call.place.stack == stack.name and (call.masked or call.causal or call.keys != states[0].shape[1]):
                raise RemedyError(
                    f"attention in {site.path} of {name} is inside windows, masked or causal: it takes no more tokens."
                )
    if placed_inside(patient, stack, states[0]):
        raise RemedyError(
            f"the blocks of {name} answer otherwise where patches change places, as with rotary positions: with more "
            "tokens each would be taken for another."
        )
    return stack, shapes
