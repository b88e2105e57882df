"""From a SPEC to a configuration: of an architecture by name, or read from a checkpoint or file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fullrank.errors import SpecError
from fullrank.spec.grammar import Spec, close_matches
from fullrank.spec.quiet import transformers_or_refuse

_VALIDATION = re.compile(r"^(Class v|V)alidation error for .*?: \w*Error: ")

__all__ = ["first_sentence", "of_architecture", "of_checkpoint", "refusals"]


def refusals() -> tuple[type[Exception], ...]:
    """What the constructors and loaders of transformers raise for input that cannot work."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        NotImplementedError,
        OSError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
        TypeError,
        ValueError,
    )


def first_sentence(error: BaseException) -> str:
    """An error's message on one line, shortened, without its final stop."""
    message = " ".join(str(error).split()) or type(error).__name__
    message = _VALIDATION.sub("", message)
    end = message.find(". ")
    message = message[:end] if 0 < end < 300 else message
    return (message if len(message) <= 300 else message[:299] + "…").rstrip(". ")


def of_architecture(spec: Spec) -> Any:
    """The default configuration of `arch:NAME`, with the options of the SPEC.

    `text_config.hidden_size=64` sets an option of a configuration within. Hyphens and underscores in NAME are alike.

    Args:
        spec: a SPEC of kind `architecture`.

    Returns:
        A transformers configuration.

    Raises:
        SpecError: for an unknown architecture or option, or values the configuration refuses.
    """
    transformers_or_refuse()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    by_plain_name = {name.replace("-", "_"): name for name in CONFIG_MAPPING_NAMES}
    name = by_plain_name.get(spec.target.lower().replace("-", "_"))
    if name is None:
        hint = close_matches(spec.target.lower(), CONFIG_MAPPING_NAMES)
        raise SpecError(f"arch={spec.target!r} is no architecture that this transformers knows{hint}.")
    try:
        config_class = CONFIG_MAPPING[name]
        default = config_class()
        return config_class(**_nested(spec, default))
    except refusals() as error:
        raise SpecError(f"SPEC {spec.text!r} gives no configuration: {first_sentence(error)}.") from error


def _nested(spec: Spec, default: Any) -> dict[str, Any]:
    """The options as constructor arguments, `a.b=c` merged into the default of `a`."""
    arguments: dict[str, Any] = {}
    for dotted, value in spec.options:
        *parents, option = dotted.split(".")
        holder, inner = default, arguments
        for parent in parents:
            holder = getattr(holder, parent, None)
            if not hasattr(holder, "to_dict"):
                raise SpecError(f"option {dotted!r} of arch:{spec.target}: {parent!r} is no configuration within it.")
            inner = inner.setdefault(parent, {})
        known = set(holder.to_dict()) | set(getattr(holder, "attribute_map", {})) | set(_fields(holder))
        if option not in known:
            hint = close_matches(option, known)
            raise SpecError(f"option {dotted!r} is unknown to the configuration of arch:{spec.target}{hint}.")
        inner[option] = value
    return arguments


def _fields(config: Any) -> tuple[str, ...]:
    return tuple(getattr(config, "__dataclass_fields__", {}))


def of_checkpoint(
    place: str, *, text: str, revision: str | None, trust_remote_code: bool, local_only: bool = False
) -> Any:
    """The configuration in a checkpoint's directory, on the hub, or in a `config.json` file.

    Args:
        place: hub id, directory or file.
        text: the SPEC as written, for sentences.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether Python files of the checkpoint may be run.
        local_only: whether only what is already cached may be used.

    Returns:
        A transformers configuration.

    Raises:
        SpecError: where there is none, it cannot be read, or it needs remote code that was not allowed.
    """
    transformers = transformers_or_refuse()
    path = Path(place)
    if path.is_dir() and not (path / "config.json").is_file():
        what = "a PEFT adapter; merge it into its base model first" if (path / "adapter_config.json").is_file() else ""
        raise SpecError(f"directory {text!r} has no config.json{': it is ' + what if what else ''}.")
    try:
        raw, _ = transformers.PretrainedConfig.get_config_dict(place, revision=revision, local_files_only=local_only)
        _check_raw(raw, text=text, trust_remote_code=trust_remote_code)
        return transformers.AutoConfig.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_only
        )
    except json.JSONDecodeError as error:
        raise SpecError(f"the configuration of {text!r} is not JSON: {first_sentence(error)}.") from error
    except refusals() as error:
        raise SpecError(f"the configuration of {text!r} cannot be read: {first_sentence(error)}.") from error


def _check_raw(raw: dict[str, Any], *, text: str, trust_remote_code: bool) -> None:
    """Refuse a configuration of an unknown model, or of one whose code is in the checkpoint, before anything runs.

    Raises:
        SpecError: saying which.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = raw.get("model_type")
    if model_type in CONFIG_MAPPING_NAMES or (raw.get("auto_map") and trust_remote_code):
        return
    if raw.get("auto_map"):
        raise SpecError(
            f"the model of {text!r} is defined by Python code in its checkpoint, which is not run by default; "
            "pass --trust-remote-code (trust_remote_code=True) if you trust it."
        )
    if model_type is None:
        raise SpecError(f"the configuration of {text!r} does not say its 'model_type'.")
    hint = close_matches(str(model_type), CONFIG_MAPPING_NAMES)
    raise SpecError(f"the configuration of {text!r} has model_type={model_type!r}, unknown to this transformers{hint}.")
