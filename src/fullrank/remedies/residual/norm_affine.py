"""What a norm does after it has normalised: the gains and shifts of any norm, from what it makes of two tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fullrank.capture.layout import Layout
from fullrank.edit import Norm
from fullrank.errors import RemedyError
from fullrank.remedies.patient import Patient
from fullrank.remedies.residual.branch_changes import stack_of

__all__ = ["OtherNorm", "moments", "refuse_other"]


def refuse_other(patient: Patient, norms: tuple[Norm, ...], name: str) -> Layout:
    """Raise where what a module normalises is not the tokens of one place in a model.

    Args:
        patient: the model.
        norms: what was found of the module.
        name: of the remedy.

    Returns:
        The layout of the stream.

    Raises:
        RemedyError: there.
    """
    one = norms[0]
    if one.kind not in ("layer", "rms"):
        found = "a batch norm already" if one.kind == "batch" else "no norm over the features of each token"
        raise RemedyError(f"{name} takes the place of norms of tokens, and {one.path} is {found}.")
    if len({(norm.stack, norm.layer) for norm in norms}) > 1:
        raise RemedyError(f"the norm {one.path} is shared by several layers, and {name} needs one for each.")
    if one.calls > 1:
        raise RemedyError(f"the norm {one.path} is called {one.calls} times, and {name} needs one for each call.")
    layout = stack_of(patient, one.stack).layout
    if layout.axes not in ("tokens", "channels last"):
        raise RemedyError(f"the stream of {one.stack} does not hold features last, as {name} needs.")
    return layout


class OtherNorm(nn.Module):
    """In the place of a norm y = γ ⊙ n(x) + β: another n, with the γ and β that the norm's own parameters say.

    They are not looked for by name. For a token u of mean 0 and mean square 1, N(cu) → γ ⊙ u + β as c grows, and
    N(−cu) → −γ ⊙ u + β: two tokens more per call, through which gradients reach the norm's parameters.

    Args:
        width: features.
        layout: of the stream.
    """

    probe: Tensor

    def __init__(self, width: int, layout: Layout) -> None:
        super().__init__()
        z = torch.ones(width)  # small whole numbers, the same in every type
        z[1::2] = -1
        if width % 2:
            z[-3:] = torch.tensor([1.0, 1.0, -2.0])[-min(width, 3) :]
        self.register_buffer("probe", z, persistent=False)
        self.layout = layout

    def placed(self, like: nn.Module) -> Self:
        """On the device of a norm, in its mode, in its type or float32 where that is narrower."""
        self.train(like.training)
        own = next((p for p in like.parameters() if p.is_floating_point()), None)
        return self if own is None else self.to(own.device, torch.promote_types(own.dtype, torch.float32))

    def affine(self, run: Callable[..., Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """γ and β.

        Args:
            run: the norm.
            like: in whose type it is called.

        Returns:
            Both (width,), in float32 or wider.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        z = self.probe.to(wide)
        u = z * torch.rsqrt(z.square().mean())
        ends = run((_large(like.dtype) * torch.stack([z, -z])).to(like.dtype)).to(wide)
        return (ends[0] - ends[1]) / (2 * u), (ends[0] + ends[1]) / 2

    def rewritten(self, state: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """What f makes of a state as (sequences, tokens, width), back in the layout of the model."""
        X = self.layout.tokens(state)
        assert X is not None
        return self.layout.back(f(X), state)


def moments(X: Tensor, real: Tensor | None, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance over axes, without what is not real.

    Args:
        X: (sequences, tokens, width), float32 or wider.
        real: (sequences, tokens, 1) bool; None for all.
        axes: over which.

    Returns:
        Both, with those axes of length 1.
    """
    if real is None:
        mean = X.mean(axes, keepdim=True)
        return mean, (X - mean).square().mean(axes, keepdim=True)
    weight = real.to(X.dtype)
    number = (weight.sum(axes, keepdim=True) * (X.shape[2] if 2 in axes else 1)).clamp(min=1)
    mean = torch.where(real, X, 0).sum(axes, keepdim=True) / number
    return mean, torch.where(real, X - mean, 0).square().sum(axes, keepdim=True) / number


def _large(dtype: torch.dtype) -> float:
    """Beside which no ε counts, and whose square every norm can hold."""
    return 4096.0 if dtype.itemsize > 2 else 64.0
