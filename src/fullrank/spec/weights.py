"""Weights: the files a checkpoint has, loaded safely, or the architecture's own random initialisation."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fullrank.errors import SpecError
from fullrank.spec.configuration import first_sentence, refusals
from fullrank.spec.quiet import forked_rng, transformers_or_refuse

__all__ = ["Checkpoint", "initialised", "on_disk", "on_hub", "pretrained"]


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint is and what it holds.

    Attributes:
        place: hub id or directory.
        files: names of its files; None where they are not known before loading.
        local_only: whether only what is already cached may be used.
    """

    place: str
    files: frozenset[str] | None
    local_only: bool = False

    @property
    def pickle_only(self) -> bool:
        """Weights in pickles (`pytorch_model.bin`), and none in safetensors."""
        files = self.files or frozenset()
        return any(map(_is_pickle, files)) and not any(name.endswith(".safetensors") for name in files)

    @property
    def has_weights(self) -> bool:
        """Whether there is a file of weights, or it is not known."""
        return self.files is None or any(name.endswith(".safetensors") or _is_pickle(name) for name in self.files)


def _is_pickle(name: str) -> bool:
    return name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))


def on_disk(directory: str) -> Checkpoint:
    """The checkpoint in a local directory."""
    return Checkpoint(directory, frozenset(path.name for path in Path(directory).iterdir()))


def on_hub(name: str, *, revision: str | None) -> Checkpoint:
    """The checkpoint of a hub id: asked of the hub once, else of the local cache.

    Args:
        name: hub id.
        revision: branch, tag or commit.

    Returns:
        The checkpoint with its list of files.

    Raises:
        SpecError: for an id the hub does not know, or when neither hub nor cache can tell.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    instead = "pass a local directory instead: fullrank examine ./path/to/checkpoint"
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    try:
        told = HfApi().model_info(name, revision=revision, timeout=10)
    except GatedRepoError:
        raise SpecError(f"hub id {name!r} is gated; log in with `hf auth login`, or {instead}.") from None
    except RepositoryNotFoundError:
        raise SpecError(f"hub id {name!r} is not on the Hugging Face hub (or is private); {instead}.") from None
    except RevisionNotFoundError:
        raise SpecError(f"revision={revision!r} of hub id {name!r} is not on the hub.") from None
    except HFValidationError as error:
        raise SpecError(f"hub id {name!r} is not valid: {first_sentence(error)}.") from None
    except Exception:  # noqa: BLE001 - no network: which error that is depends on the hub's HTTP client
        if not isinstance(cached, str):
            raise SpecError(
                f"hub id {name!r} is not in the local cache and the Hugging Face hub cannot be reached; {instead}."
            ) from None
        files = frozenset(path.name for path in Path(cached).parent.iterdir())
        return Checkpoint(name, files, local_only=True)
    return Checkpoint(name, frozenset(sibling.rfilename for sibling in told.siblings or ()))


def pretrained(
    checkpoint: Checkpoint,
    config: Any,
    *,
    text: str,
    revision: str | None,
    dtype: torch.dtype | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    seed: int,
    head: bool = False,
    placed: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The trunk with the checkpoint's weights.

    Pickles are read with `weights_only=True`: they can then hold tensors and nothing that runs.

    Args:
        checkpoint: where the weights are.
        config: the checkpoint's configuration.
        text: the SPEC as written, for sentences.
        revision: branch, tag or commit on the hub.
        dtype: dtype to load in; None keeps the checkpoint's.
        allow_pickle: whether weights may be read from pickles.
        trust_remote_code: whether Python files of the checkpoint may be run.
        seed: seeds weights that the checkpoint does not have.
        head: whether to load the class that the checkpoint names, and not its trunk.
        placed: where the weights go, as `memory.within` says; by default all of them into memory.

    Returns:
        The model and notes on weights that are not the checkpoint's.

    Raises:
        SpecError: for pickles that were not allowed, missing, corrupt or mismatched weights.
    """
    if not checkpoint.has_weights:
        raise SpecError(f"{text!r} has no weights (no .safetensors file); pass --init for random weights.")
    if checkpoint.pickle_only and not allow_pickle:
        raise SpecError(
            f"the weights of {text!r} are pickles (pytorch_model.bin), which can run code; "
            "convert them to safetensors, or pass --allow-pickle (allow_pickle=True)."
        )
    transformers = transformers_or_refuse()
    try:
        with forked_rng(seed):
            model, info = _class(transformers, config, head=head).from_pretrained(
                checkpoint.place,
                config=config,
                revision=revision,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=not checkpoint.pickle_only,
                weights_only=True,
                trust_remote_code=trust_remote_code,
                local_files_only=checkpoint.local_only,
                output_loading_info=True,
                **(placed or {}),
            )
    except pickle.UnpicklingError as error:
        raise SpecError(
            f"the pickle of {text!r} holds more than tensors (or is damaged); convert it to safetensors."
        ) from error
    except refusals() as error:
        message = first_sentence(error)
        if "ignore_mismatched_sizes" in message or "size mismatch" in message:
            message = "tensors have other shapes than its config.json says"
        raise SpecError(f"the weights of {text!r} cannot be loaded: {message}.") from error
    return model, _missing(model, info["missing_keys"], text=text)


def _missing(model: nn.Module, missing: set[str], *, text: str) -> tuple[str, ...]:
    """Notes on weights the checkpoint did not have.

    Returns:
        None or one note.

    Raises:
        SpecError: where that is most of the model: then the checkpoint is not this architecture's.
    """
    if not missing:
        return ()
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    share = sum(sizes.get(name, 0) for name in missing) / max(1, sum(sizes.values()))
    if share > 0.5:
        raise SpecError(
            f"the checkpoint {text!r} does not fit its config.json: {len(missing)} tensors "
            f"({share:.0%} of {type(model).__name__}) are not in it."
        )
    names = sorted(missing)
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (f"not in the checkpoint, initialised at random: {listed}",)


def _class(transformers: Any, config: Any, *, head: bool) -> Any:
    """The class to load: the trunk's, or the one that the configuration names."""
    named = getattr(transformers, (getattr(config, "architectures", None) or ["AutoModel"])[0], None)
    return named if head and named is not None else transformers.AutoModel


def initialised(
    config: Any, *, text: str, dtype: torch.dtype, trust_remote_code: bool, seed: int, head: bool = False
) -> nn.Module:
    """The trunk at the architecture's own random initialisation.

    Built first without memory (on the meta device), to count its parameters before any is allocated.

    Args:
        config: a transformers configuration.
        text: the SPEC as written, for sentences.
        dtype: dtype of the weights.
        trust_remote_code: whether Python files of the checkpoint may be run.
        seed: seeds the initialisation; the global generators are given back as they were.
        head: whether to build the class that the configuration names, and not its trunk.

    Returns:
        The model, on the CPU.

    Raises:
        SpecError: where the constructor refuses the configuration, or the model would not fit in memory.
    """
    transformers = transformers_or_refuse()
    chosen = _class(transformers, config, head=head)
    of_trunk = chosen is transformers.AutoModel
    make = chosen.from_config if of_trunk else chosen._from_config
    keywords = {"dtype": dtype} | ({"trust_remote_code": trust_remote_code} if of_trunk else {})
    try:
        with forked_rng(seed), torch.device("meta"):
            count = sum(tensor.numel() for tensor in make(config, **keywords).parameters())
    except refusals():
        count = 0  # some constructors need real memory; the next lines say what is wrong, if anything is
    needed, memory = count * dtype.itemsize, _memory()
    if needed > memory:
        raise SpecError(
            f"SPEC {text!r} has {count / 1e9:.1f}B parameters, {needed / 2**30:.0f} GiB in {str(dtype)[6:]}, more than "
            f"this machine's {memory / 2**30:.0f} GiB; make it smaller, as in arch:llama?num_hidden_layers=4."
        )
    try:
        with forked_rng(seed):
            model: nn.Module = make(config, **keywords)
    except refusals() as error:
        message = first_sentence(error)
        if "Unrecognized configuration class" in message:
            message = "it is a part of another model, or needs more than a configuration"
        raise SpecError(f"no model can be built from {text!r}: {message}.") from error
    return model


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63
