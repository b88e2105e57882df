"""An architecture as a sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fullrank.architecture.architecture import Architecture

__all__ = ["sentence"]

_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "batchnorm": "batch norm", "none": "no norm"}


def sentence(architecture: Architecture) -> str:
    """`gpt2: 12 blocks of width 768, 12 heads of 64, pre-LayerNorm, …`.

    Args:
        architecture: what to describe.

    Returns:
        One line, without a full stop.
    """
    one = architecture
    blocks = f"{one.depth} {'parallel ' if one.parallel else ''}block{'s' if one.depth > 1 else ''}"
    heads = f"{one.heads} head{'s' if one.heads > 1 else ''} of {one.head_width}"
    if one.key_value_heads != one.heads:
        heads += f" ({one.key_value_heads} of keys and values)"
    norm = _NORMS[one.norm] if one.placement == "none" else f"{one.placement}-{_NORMS[one.norm]}"
    said = [f"{blocks} of width {one.width}", heads + (", q and k normalised" if one.qk_norm else ""), norm]
    gated = "gated " if one.gated else ""
    said.append(f"{gated}{one.activation} MLP of {one.mlp_width}" if one.mlp_width else "no MLP")
    said += _scales(one)
    said.append(f"standard deviations q, k {_both(one.std_q, one.std_k)}, v, o {_both(one.std_v, one.std_o)}")
    if one.mlp_width:
        said[-1] += f", MLP {_both(one.std_up, one.std_down)}"
    if one.softcap is not None:
        said.append(f"logits bounded at {one.softcap:.3g}")
    window = "" if one.window is None else f", window {one.window}"
    said.append(f"{one.mask} attention over {one.context} tokens{window}, {_positions(one)}")
    error = f" ± {one.correlation_stderr:.2g}" if one.correlation_stderr else ""
    said.append(f"token correlation {one.correlation:.3g}{error} at the start")
    return (f"{one.name}: " if one.name else "") + ", ".join(said)


def _scales(one: Architecture) -> list[str]:
    said = []
    for what, attention, mlp in (
        ("branches", one.attention_branch, one.mlp_branch),
        ("skips", one.attention_skip, one.mlp_skip),
    ):
        if not one.mlp_width:
            mlp = attention
        if attention != 1 or mlp != 1:
            said.append(f"{what} times {_both(attention, mlp)}")
    return said


def _positions(one: Architecture) -> str:
    return "no positions" if one.positions == "none" else f"{one.positions} positions"


def _both(first: float, second: float) -> str:
    return f"{first:.3g}" if math.isclose(first, second, rel_tol=5e-3) else f"{first:.3g} and {second:.3g}"
