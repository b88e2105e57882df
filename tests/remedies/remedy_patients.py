"""The models that every remedy is tried on: small, random, float64, of each way to attend and to normalise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import kinds
import torch
from torch import Tensor, nn

from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig


class Case:
    """A model with what it is called with.

    Attributes:
        model: in evaluation mode, float64.
        batch: keyword arguments.
        blocks: how many block calls there are, in all stacks.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], blocks: int) -> None:
        self.model, self.batch, self.blocks = model, dict(batch), blocks

    def __call__(self) -> Tensor:
        """The first floating tensor of one forward."""
        return self.answer(self.model)

    def answer(self, model: nn.Module) -> Tensor:
        output = model(**self.batch)
        if isinstance(output, Tensor):
            return output
        if hasattr(output, "logits"):
            return output.logits
        return output[0]


def _kind(name: str) -> Case:
    kind = kinds.build(name)
    blocks = sum(len(kind.blocks(stack)) for stack in kind.lists) if name != "albert" else 3
    return Case(kind.model, kind.batch, blocks)


def _zoo(**options: Any) -> Case:
    sizes = {"depth": 3, "width": 32, "heads": 4, "mlp_width": 64}
    vision = options.get("kind") == "vision"
    sizes |= {"image": 16, "patch": 4, "classes": 5} if vision else {"vocabulary": 50, "context": 32}
    model = Transformer(TransformerConfig(**(sizes | options)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention is not uniform and no bias or gain is trivial
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    model.double().eval()
    if vision:
        images = torch.randn(2, 3, 16, 16, generator=generator).double()
        return Case(model, {"pixel_values": images}, sizes["depth"])
    return Case(model, {"input_ids": kinds.ids()}, sizes["depth"])


def _state_space() -> Case:
    model = StateSpace(StateSpaceConfig(depth=3, width=16, states=4, vocabulary=50), seed=0).double().eval()
    return Case(model, {"input_ids": kinds.ids()}, 3)


PATIENTS: dict[str, Callable[[], Case]] = {
    **{
        name: functools.partial(_kind, name)
        for name in ("gpt2", "llama_padded", "bert", "t5", "vit", "torch_encoder", "plain_softmax")
    },
    "zoo_decoder": lambda: _zoo(kind="decoder", norm="rmsnorm", positions="rotary", key_value_heads=2),
    "zoo_vision": lambda: _zoo(kind="vision"),
    "zoo_post": lambda: _zoo(kind="encoder", placement="post"),
}
"""By name; each call builds one anew."""

STATE_SPACES: dict[str, Callable[[], Case]] = {"zoo_state_space": _state_space}
"""The same, without attention: for remedies of state spaces, and for them alone."""

CAUSAL = ("gpt2", "llama_padded", "plain_softmax", "zoo_decoder")
POST_NORM = ("bert", "torch_encoder", "zoo_post")
EXPLICIT = ("plain_softmax",)
"""Models that softmax by themselves: their queries and keys are not seen."""


def build(name: str) -> Case:
    return (PATIENTS | STATE_SPACES)[name]()


def patients_of(acts_on: str) -> tuple[str, ...]:
    """Names of the models that remedies which act there are tried on."""
    return tuple(STATE_SPACES if acts_on == "state space" else PATIENTS)


@torch.no_grad()
def stir(parameters: Mapping[str, nn.Parameter] | list[nn.Parameter], size: float = 0.3) -> None:
    """Give parameters other values, so that nothing is tested at a point where it does nothing."""
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters.values() if isinstance(parameters, Mapping) else parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.copy_(torch.where(torch.isfinite(parameter), parameter, torch.zeros_like(parameter)) + size * noise)
