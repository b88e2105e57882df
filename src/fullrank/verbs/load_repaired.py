"""Loading weights that were saved with repairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.wrappers import bare
from fullrank.errors import RemedyError
from fullrank.remedies import Asked, Repair, asked_for, repaired
from fullrank.remedies.applying.record import KEY, Entry, prefix_in_weights, record_in_weights
from fullrank.spec import Spec, Subject, load, parse
from fullrank.verbs.repair import call_for

__all__ = ["load_repaired", "loaded"]

Weights = str | Path | Mapping[str, Tensor]


def load_repaired(model: nn.Module, weights: Weights, *, batch: Any = None) -> Repair:
    """Apply to a plain model the repairs that weights were saved with, and load the weights.

    ```python
    model = AutoModelForCausalLM.from_config(config)        # as it is without repairs; its weights do not matter
    repair = fullrank.load_repaired(model, "checkpoint")
    ```

    Args:
        model: of the same architecture.
        weights: a directory with safetensors, a file of that kind, or a `state_dict`, also of the model inside
            `torch.compile` or data parallelism. Nothing is unpickled.
        batch: what the model is called with; by default one made for it.

    Returns:
        The handle. Undoing takes the structure out and leaves the loaded weights.

    Raises:
        RemedyError: where no repairs are recorded, the weights do not fit, or there are none; the model is unchanged.
    """
    found = weights if isinstance(weights, Mapping) else _read(Path(weights))
    entries = record_in_weights(found)
    if not entries:
        raise RemedyError(_without(None if isinstance(weights, Mapping) else Path(weights), found))
    prefix = prefix_in_weights(found)
    found = {name.removeprefix(prefix): value for name, value in found.items()}
    call = call_for(model, batch)
    repair = repaired(model, lambda: call.run(model), _asked(entries))
    try:
        _fill(bare(model), found)
    except BaseException:
        repair.undo()
        raise
    return repair


def loaded(spec: Spec | str, **options: Any) -> Subject:
    """What `spec.load` gives, with the repairs that the checkpoint was saved with in place.

    Args:
        spec: which model.
        **options: of `spec.load`.

    Returns:
        The subject. A repaired model comes whole, with its task head.

    Raises:
        RemedyError: where its repairs cannot be put in place.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    entries = _recorded(Path(spec.target)) if spec.kind == "directory" else []
    if not any(one["structural"] for one in entries):
        return load(spec, **options)
    saved = None if options.get("init") else _read(Path(spec.target))
    if saved is not None and not record_in_weights(saved):
        raise RemedyError(_without(Path(spec.target), saved))
    subject = load(spec, **{**options, "head": True, "repairs": True})
    config = getattr(subject.model, "config", None)
    getattr(config, "__dict__", {}).pop(KEY, None)  # it is written again by the repair
    asked = _asked([one for one in entries if one["structural"]])
    call = call_for(subject)
    repaired(subject.model, lambda: call.run(subject.model), asked)
    if saved is not None:
        _fill(subject.model, saved)
    names = ", ".join(one.remedy.name for one in asked)
    said = f"repaired, as it was saved, with {names}"
    return replace(subject, description=f"{subject.description}, {said}", notes=(*subject.notes, said))


def _without(place: Path | None, weights: Mapping[str, Tensor]) -> str:
    """Why weights without a record cannot be loaded so, in one sentence."""
    if place is None:
        return "the weights were saved without structural repairs: load them as any other weights."
    directory = place if place.is_dir() else place.parent
    names = ", ".join(str(one["name"]) for one in _recorded(directory) if one.get("structural"))
    if names:
        return (
            f"{str(place)!r}: its configuration names the repairs {names}, and its weights were saved without them, by "
            "a model on which they were not in force: take fullrank_repairs out of config.json and load the weights "
            "as any other, or save the repaired model again."
        )
    adapters = bool(weights) and all("lora_" in name for name in weights)
    if adapters or (directory / "adapter_config.json").is_file():
        return (
            f"{str(place)!r} holds adapters alone, as peft saves them, and no record of repairs: save the state_dict "
            "of the repaired model."
        )
    return f"{str(place)!r} were saved without structural repairs: load them as any other weights."


def _recorded(directory: Path) -> list[Entry]:
    """What the configuration of a directory records; a checkpoint of the hub is refused by `load`, in a sentence."""
    file = directory / "config.json"
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return []  # `load` says what is wrong with it
    entries = found.get(KEY) if isinstance(found, dict) else None
    return [one for one in entries if isinstance(one, dict) and "name" in one] if isinstance(entries, list) else []


def _asked(entries: list[Entry]) -> tuple[Asked, ...]:
    return asked_for({one["name"]: one["parameters"] for one in entries}, {})


def _read(place: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of all such files in a directory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise RemedyError(f"{str(place)!r} holds no safetensors file to load weights from.")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except SafetensorError:
            raise RemedyError(f"{str(file)!r} is no safetensors file; nothing else is read.") from None
    return found


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights; of tied ones a file holds one."""
    own = model.state_dict()
    records = {name: own.pop(name) for name in list(own) if _is_record(name)}
    weights = {name: value for name, value in weights.items() if not _is_record(name)}  # it was read already
    saved = {} if all(name in own for name in weights) else _saved_names(model)
    weights = {saved.get(name, name): value for name, value in weights.items()}
    wrong = [name for name, value in weights.items() if name in own and own[name].shape != value.shape]
    unknown = [name for name in weights if name not in own]
    known = {own[name].data_ptr() for name in weights if name in own and own[name].numel()}
    missing = [
        name for name, value in own.items() if name not in weights and value.numel() and value.data_ptr() not in known
    ]
    for names, what in ((unknown, "are not in the model"), (missing, "are missing"), (wrong, "have another shape")):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise RemedyError(f"the weights do not fit this {type(model).__name__}: {listed} {what}.")
    with torch.no_grad():
        model.load_state_dict({**weights, **records}, strict=False)


def _is_record(name: str) -> bool:
    return name.rpartition(".")[2] == KEY


def _saved_names(model: nn.Module) -> dict[str, str]:
    """By the name under which a model of Hugging Face saves a tensor, the name that the tensor has in its modules."""
    own = list(model.state_dict())
    if not hasattr(model, "save_pretrained"):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        saved = revert_weight_conversion(model, {name: torch.tensor(number) for number, name in enumerate(own)})
        return {name: own[int(number)] for name, number in saved.items()}
    except (ImportError, RuntimeError, ValueError, IndexError, TypeError):
        return {}  # it saves tensors in another form, not only under other names
