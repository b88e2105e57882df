"""The first blocks of a model too large to be drawn whole, as its own code draws them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullrank.errors import SpecError
from fullrank.spec.configuration import first_sentence, refusals
from fullrank.spec.quiet import forked_rng, quiet, transformers_or_refuse

__all__ = ["Shallow", "shallow"]

WHOLE = 200_000_000  # parameters: a model of this size is drawn whole in a second or two
_FEWEST = 2  # blocks, without which nothing shows that they repeat
_SIMPLE = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Shallow:
    """A model, perhaps with fewer blocks than its configuration says.

    Attributes:
        model: at its own random initialisation, in evaluation mode, on the CPU.
        depths: of each list of blocks that was cut, by its name, how many there were.
    """

    model: nn.Module
    depths: dict[str, int]

    def depth(self, paths: tuple[str, ...]) -> int:
        """How many blocks there are where the model holds those of these names."""
        for name, depth in self.depths.items():
            if paths and all(path.startswith(f"{name}.") for path in paths):
                return depth
        return len(paths)


def shallow(config: Any, *, seed: int, whole: int = WHOLE) -> Shallow:
    """The model of a configuration at its own initialisation, cut to its first blocks where it is large.

    Its constructor runs under the full configuration with parameters that take no memory; lists of blocks of which all
    kinds have occurred are then cut, and what is left is drawn by the model's own initialisation. So whatever depends
    on the depth (a standard deviation, a factor of a branch) is that of the whole model.

    Args:
        config: a transformers configuration; it is copied.
        seed: of the draw; global generators are given back as they were.
        whole: parameters up to which nothing is cut.

    Returns:
        The model.

    Raises:
        SpecError: where no model can be built from the configuration.
    """
    hf = transformers_or_refuse()
    if not isinstance(config, hf.PretrainedConfig):
        raise SpecError(f"config={type(config).__name__} is no transformers configuration.")
    config = copy.deepcopy(config)
    name = type(config).__name__
    with quiet(), forked_rng(seed):
        try:
            with _parameters_without_memory():
                model: Any = hf.AutoModel.from_config(config, dtype=torch.float32)
            if sum(parameter.numel() for parameter in model.parameters()) <= whole:
                torch.default_generator.manual_seed(seed)
                return Shallow(hf.AutoModel.from_config(config, dtype=torch.float32).eval(), {})
            depths = _cut(model)
            torch.default_generator.manual_seed(seed)
            _draw(model)
        except refusals() as error:
            raise SpecError(f"no model can be built from {name}: {first_sentence(error)}.") from None
    return Shallow(model.eval(), depths)


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Inside, parameters are on the meta device and buffers, which constructors compute, are not."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _cut(model: nn.Module) -> dict[str, int]:
    """Cut every list of blocks of one class after the first of each kind; gives how many there were."""
    depths: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in depths):
            continue
        blocks = list(module)
        if (
            len(blocks) <= _FEWEST
            or len({type(block) for block in blocks}) > 1
            or next(blocks[0].parameters(), None) is None
        ):
            continue
        kinds = _kinds(blocks)
        keep = max(_FEWEST, *(kinds.index(kind) + 1 for kind in kinds))
        if keep < len(blocks):
            depths[name] = len(blocks)
            del module[keep:]
            for index in range(keep):
                _share(module[index], module[kinds.index(kinds[index])])
    return depths


def _share(block: nn.Module, first: nn.Module) -> None:
    """Let a block have the parameters of the first of its kind; one draw is as good as another."""
    if block is first:
        return
    for mine, theirs in zip(block.modules(), first.modules(), strict=True):
        mine._parameters.update(theirs._parameters)


def _kinds(blocks: Sequence[nn.Module]) -> list[Any]:
    """What tells blocks apart: classes, shapes and plain attributes, but for those that are a block's own number."""
    plain = [_plain(block) for block in blocks]
    numbers = {key for key in plain[0] if all(found.get(key) == index for index, found in enumerate(plain))}
    shapes = [[(name, p.shape) for name, p in block.named_parameters()] for block in blocks]
    return [
        ({key: value for key, value in found.items() if key not in numbers}, own)
        for found, own in zip(plain, shapes, strict=True)
    ]


def _plain(block: nn.Module) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        found[name, "class"] = type(module)
        found |= {(name, key): value for key, value in vars(module).items() if isinstance(value, _SIMPLE)}
    return found


def _draw(model: Any) -> None:
    """Give parameters memory and let the model draw them."""
    made: dict[int, nn.Parameter] = {}
    drawn: set[int] = set()
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        own = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
        if own and own <= drawn:
            module._is_hf_initialized = True  # its parameters are another one's
        drawn |= own
    with torch.no_grad():
        for parameter in made.values():
            parameter.view(-1)[:1] = torch.nan  # what nobody draws must not look drawn
        model.init_weights()
    left = [name for name, parameter in model.named_parameters() if bool(parameter.view(-1)[:1].isnan().any())]
    if left:
        raise SpecError(f"{type(model).__name__} does not draw {left[0]!r} itself, and is too large to be built whole.")
