"""What a saved model says of its repairs, and why it is not loaded without them."""

from __future__ import annotations

from typing import Any

from fullrank.errors import SpecError

__all__ = ["REPAIRS", "refuse_repaired"]

REPAIRS = "fullrank_repairs"
"""The field of a configuration, and the buffer beside the weights, that names the repairs of a saved model."""


def refuse_repaired(config: Any, text: str) -> None:
    """Refuse weights that mean something else without the repairs that they were trained with.

    Args:
        config: the configuration of a checkpoint.
        text: the SPEC that named it.

    Raises:
        SpecError: for such.
    """
    entries = getattr(config, REPAIRS, None) or ()
    names = [str(one.get("name")) for one in entries if isinstance(one, dict) and one.get("structural")]
    if names:
        raise SpecError(
            f"{text!r} was saved with the repairs {', '.join(names)}, and its weights mean nothing without them: "
            "load it with fullrank.load_repaired."
        )
