"""Every remedy there is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fullrank.errors import RemedyError
from fullrank.remedies import (
    attn_scale,
    batch_norm,
    bn_orthogonalise,
    center_attention,
    contranorm,
    deepnorm,
    deepscale_init,
    deflate_attention,
    differential,
    entropy_regulariser,
    feat_scale,
    gain_control,
    holistic_norm,
    hopfield,
    lambda_skip,
    layer_scale,
    layernorm_scaling,
    learned_sink,
    local_mask,
    neutreno,
    orthogonal_init,
    peri_norm,
    polarise,
    position_gate,
    qk_clip,
    qk_norm,
    qk_scale_init,
    qkv_norm,
    rank_regulariser,
    reduce_tokens,
    registers,
    residual_scale,
    residual_scores,
    rezero,
    scaled_init,
    shaped,
    sigma_reparam,
    skip_init,
    small_init,
    softcap,
    softpick,
    t_fixup,
    temperature,
    value_output_sign,
    value_residual,
)
from fullrank.remedies.remedy import Remedy
from fullrank.spec.grammar import close_matches

__all__ = ["CATALOGUE", "remedy_of"]

_ROOMS = (
    center_attention,
    deflate_attention,
    gain_control,
    attn_scale,
    feat_scale,
    differential,
    shaped,
    temperature,
    qk_norm,
    qk_clip,
    softcap,
    learned_sink,
    softpick,
    local_mask,
    hopfield,
    residual_scores,
    value_residual,
    neutreno,
    position_gate,
    scaled_init,
    deepscale_init,
    t_fixup,
    small_init,
    qk_scale_init,
    orthogonal_init,
    sigma_reparam,
    value_output_sign,
    bn_orthogonalise,
    residual_scale,
    rezero,
    skip_init,
    layer_scale,
    lambda_skip,
    deepnorm,
    layernorm_scaling,
    peri_norm,
    holistic_norm,
    qkv_norm,
    batch_norm,
    contranorm,
    registers,
    entropy_regulariser,
    rank_regulariser,
    reduce_tokens,
    polarise,
)

CATALOGUE: Final[Mapping[str, Remedy]] = MappingProxyType(
    {one.name: one for room in _ROOMS for one in vars(room).values() if isinstance(one, Remedy)}
)
"""By name: of attention, of weights, of the residual stream and its norms, of the loss, of tokens, of state spaces."""


def remedy_of(name: str) -> Remedy:
    """The remedy of that name.

    Returns:
        It.

    Raises:
        RemedyError: where there is none; similar names are suggested.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    hint = close_matches(name, CATALOGUE) or "; `fullrank remedies` lists them"
    raise RemedyError(f"{name!r} is no remedy{hint}.")
