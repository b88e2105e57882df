"""What a model says of the next token, token by token."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fullrank.metrics.rows import mean_over_rows

__all__ = ["token_loss", "token_losses"]

_ENTRIES = 2**24
"""Logits that are made float32 at a time."""


def token_loss(
    logits: Float[Tensor, "*batch tokens words"],
    targets: Int[Tensor, "*batch tokens"],
    mask: Bool[Tensor, "*#batch #tokens"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean cross-entropy of what tokens say of their targets, (1/|M|) Σ_{t∈M} (log Σ_w e^{z_tw} − z_{t,y_t}), in nats.

    0 where every target is certain, log W where all W words are equally likely. O(T W).

    Args:
        logits: of every word, at every token.
        targets: the word that followed; a negative one counts as none.
        mask: M, which tokens are asked; all of those with a target by default.

    Returns:
        One number per sequence; NaN where no token is asked.
    """
    return mean_over_rows(token_losses(logits, targets), mask)


def token_losses(
    logits: Float[Tensor, "*batch tokens words"], targets: Int[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """Cross-entropy of every token's logits with its target, in nats; NaN where the target is negative."""
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    rows = max(1, _ENTRIES // logits.shape[-1])
    found = [_of_rows(z, y) for z, y in zip(flat.split(rows), wanted.split(rows), strict=True)]
    return torch.cat(found).reshape(targets.shape)


def _of_rows(z: Tensor, y: Tensor) -> Tensor:
    z = z if z.dtype == torch.float64 else z.float()
    chosen = z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(y < 0, torch.nan, z.logsumexp(-1) - chosen)
