"""What a block adds to its stream: attention, an MLP or a state space, with a norm before it or after."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Branch", "scaled"]


class Branch(nn.Module):
    """N'(f(N X)): one module, so that what is added to the stream is what a module returns.

    Args:
        inner: f.
        before: N; None for none.
        after: N'; None for none.
    """

    def __init__(self, inner: nn.Module, *, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.before = before
        self.inner = inner
        self.after = after

    def forward(self, X: Tensor, mask: Tensor | None = None) -> Tensor:
        """What is added to the stream.

        Args:
            X: (sequences, tokens, width).
            mask: handed to `inner` where it is given.

        Returns:
            (sequences, tokens, width).
        """
        read = X if self.before is None else self.before(X)
        wrote: Tensor = self.inner(read) if mask is None else self.inner(read, mask)
        return wrote if self.after is None else self.after(wrote)


def scaled(factor: float, X: Tensor) -> Tensor:
    """Factor times X, and X itself where that is 1."""
    return X if factor == 1 else factor * X
