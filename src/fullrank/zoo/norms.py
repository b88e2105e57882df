"""The norms of the zoo, over the width of each token or over all tokens of a batch."""

from __future__ import annotations

from torch import Tensor, nn

from fullrank.zoo.configuration import Norm

__all__ = ["TokenBatchNorm", "norm_of"]


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm whose samples are all tokens of all sequences, padding among them.

    In evaluation mode running statistics stand in for the batch's; before the first training step these are 0 and 1.
    """

    def forward(self, X: Tensor) -> Tensor:
        """(sequences, tokens, width), each feature with mean 0 and variance 1 over the batch."""
        return super().forward(X.reshape(-1, X.shape[-1])).view(X.shape)


def norm_of(kind: Norm, width: int, *, biases: bool = True) -> nn.Module:
    """A norm with gains of 1, and biases of 0 where it has them.

    Args:
        kind: which; `none` for the identity.
        width: of a token.
        biases: whether a layer norm has one.

    Returns:
        The module.
    """
    match kind:
        case "layernorm":
            return nn.LayerNorm(width, bias=biases)
        case "rmsnorm":
            return nn.RMSNorm(width, eps=1e-6)
        case "batchnorm":
            return TokenBatchNorm(width)
    return nn.Identity()
