"""Every remedy there is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fullrank.errors import RemedyError
from fullrank.remedies.attention import (
    attn_scale,
    center_attention,
    deflate_attention,
    differential,
    feat_scale,
    gain_control,
    hopfield,
    learned_sink,
    local_mask,
    neutreno,
    position_gate,
    qk_norm,
    residual_scores,
    shaped,
    softcap,
    softpick,
    temperature,
    value_residual,
)
from fullrank.remedies.loss import entropy_regulariser, rank_regulariser
from fullrank.remedies.remedy import Remedy
from fullrank.remedies.residual import (
    batch_norm,
    contranorm,
    deepnorm,
    holistic_norm,
    lambda_skip,
    layer_scale,
    layernorm_scaling,
    peri_norm,
    qkv_norm,
    registers,
    residual_scale,
    rezero,
    skip_init,
)
from fullrank.remedies.state_space import polarise
from fullrank.remedies.tokens import reduce_tokens
from fullrank.remedies.weights import (
    bn_orthogonalise,
    deepscale_init,
    orthogonal_init,
    qk_clip,
    qk_scale_init,
    scaled_init,
    sigma_reparam,
    small_init,
    t_fixup,
    value_output_sign,
)
from fullrank.spec.grammar import close_matches

__all__ = ["CATALOGUE", "remedy_of"]

_FILES = (
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
    {one.name: one for file in _FILES for one in vars(file).values() if isinstance(one, Remedy)}
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
