"""The model under examination, with what is needed to feed it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

__all__ = [
    "Modality",
    "Positions",
    "Subject",
    "describe",
    "device_of",
    "first_option",
    "forward_names",
    "modality",
    "positions",
]

Modality = Literal["text", "vision", "audio", "multimodal", "unknown"]


@dataclass(frozen=True)
class Positions:
    """How long a sequence the model takes.

    Attributes:
        limit: tokens; None where nothing limits them.
        learned: True where a table of positions ends there (no longer sequence runs); False where the configuration
            names a length that rotary or relative positions can exceed.
    """

    limit: int | None = None
    learned: bool = False


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model in evaluation mode.

    Attributes:
        model: the trunk, without a task head.
        name: what the user called it.
        description: class, size, dtype, device and where the weights are from, in one line.
        fresh: True where the weights are a random initialisation; None where nobody knows.
        modality: what it reads.
        tokenizer: the checkpoint's tokenizer; None where there is none.
        image_processor: the checkpoint's image processor; None where there is none.
        positions: how long a sequence it takes.
        vocabulary: how many token ids it knows; None where it reads none.
        batch: what a Python factory gave along with the model; None otherwise.
        notes: what to know when reading numbers of it, such as weights the checkpoint did not have.
    """

    model: nn.Module
    name: str
    description: str
    fresh: bool | None
    modality: Modality = "unknown"
    tokenizer: Any = None
    image_processor: Any = None
    positions: Positions = Positions()
    vocabulary: int | None = None
    batch: Any = None
    notes: tuple[str, ...] = ()

    @property
    def max_positions(self) -> int | None:
        """The longest sequence of `positions`; None where nothing limits it."""
        return self.positions.limit

    @property
    def config(self) -> Any:
        """The model's configuration; None where it has none."""
        return getattr(self.model, "config", None)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next((tensor.dtype for tensor in _tensors(self.model) if tensor.is_floating_point()), torch.float32)

    @property
    def kind_of_model(self) -> str:
        """Its architecture's name, such as `gpt2`, for sentences."""
        return getattr(self.config, "model_type", None) or type(self.model).__name__


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter lies, or, where that is offloaded, where accelerate brings it to run."""
    for tensor in _tensors(model):
        if not tensor.is_meta:
            return tensor.device
    for module in model.modules():
        found = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if found is not None:
            return torch.device(found)
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def forward_names(model: nn.Module) -> set[str]:
    """The names of the arguments that the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def first_option(config: Any, *names: str) -> Any:
    """The first of the options that the configuration, or the text, vision or audio configuration in it, has.

    Returns:
        Its value; None where no configuration has any of them.
    """
    inner = [getattr(config, part, None) for part in ("text_config", "vision_config", "audio_config", "encoder")]
    for name in names:
        for holder in (config, *inner):
            value = getattr(holder, name, None)
            if value is not None:
                return value
    return None


def modality(model: nn.Module) -> Modality:
    """What the model reads, from the name of its main input (Hugging Face) or its forward's arguments."""
    config = getattr(model, "config", None)
    names = forward_names(model)
    has_both = {"text_config", "vision_config"} <= set(dir(config)) and {"input_ids", "pixel_values"} <= names
    main = getattr(model, "main_input_name", None) if config is not None else None
    if has_both and hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        return "multimodal"  # two towers: both are fed. A language model that may see images is fed text.
    towers = [name for name in ("get_audio_features", "get_video_features") if hasattr(model, name)]
    if main is None or (towers and hasattr(model, "get_text_features")):
        return "unknown"  # two towers of which one is fed what is not made here
    if main == "input_ids":
        return "text"
    if main.startswith("pixel_values"):
        return "vision"
    if main in ("input_features", "input_values"):
        return "audio"
    return "unknown"


def positions(model: nn.Module) -> Positions:
    """How long a sequence the model takes, from its configuration and its position tables.

    A table with a padding row (RoBERTa) starts counting after it, so that it holds fewer positions than rows.

    Returns:
        The limit and whether it is a table's end.
    """
    limit = first_option(getattr(model, "config", None), "max_position_embeddings", "max_target_positions")
    if not isinstance(limit, int) or limit < 1:
        return Positions()
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("pos" in name or name == "wpe"):
            continue
        rows, padding = module.num_embeddings, module.padding_idx
        if rows == limit and padding is not None:
            return Positions(rows - padding - 1, learned=True)
        if limit <= rows <= limit + 4:  # OPT and BART keep a few rows in front
            return Positions(limit, learned=True)
    for path, buffer in model.named_buffers():
        if path.endswith("embed_positions") and buffer.shape[0] == limit:  # GPT-J: rotary, but from a table
            return Positions(limit, learned=True)
    return Positions(limit)


def describe(model: nn.Module, weights: str) -> str:
    """`BertModel, 6 layers, width 384, 22.7M parameters, float32, on cpu; pretrained weights`.

    Args:
        model: any module.
        weights: where the weights are from.

    Returns:
        One line; layers and width only where the configuration says them.
    """
    config = getattr(model, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    count = sum(parameter.numel() for parameter in model.parameters())
    first = next(model.parameters(), None)
    pieces = [type(model).__name__]
    if isinstance(layers, int):
        pieces.append(f"{layers} layers")
    if isinstance(width, int):
        pieces.append(f"width {width}")
    pieces.append(f"{_round(count)} parameters")
    if first is not None:
        pieces.append(str(first.dtype).removeprefix("torch."))
        pieces.append(f"on {device_of(model)}")
    return f"{', '.join(pieces)}; {weights}"


def _round(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
