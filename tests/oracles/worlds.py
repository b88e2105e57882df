"""One small random world in which every metric of the vocabulary can be taken, and what may be done to it.

Kept next to the oracles because it, too, must not know how the metrics are computed.
"""

import dataclasses
from collections.abc import Callable

import torch

import fullrank.metrics as metrics


@dataclasses.dataclass(frozen=True)
class World:
    """States of two sequences before, between and after blocks, and one layer's attention over the first."""

    X: torch.Tensor
    X_previous: torch.Tensor
    X_0: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor
    visible: torch.Tensor
    V: torch.Tensor
    K: torch.Tensor
    contributions: torch.Tensor
    W_O: torch.Tensor
    readout: torch.Tensor

    @property
    def A(self):
        return self.logits.masked_fill(~self.visible, -1e30).softmax(-1)


def world(seed: int, *, size: float = 1.0, shift: float = 0.0, sharpness: float = 1.0) -> World:
    """Sequences of up to 7 tokens, width 9, 3 heads."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    T, d = 7, 9
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, 5:] = False
    visible = torch.rand(T, T, generator=generator) > 0.3
    visible |= torch.eye(T, dtype=torch.bool)
    return World(
        X=size * (draw(2, T, d) + shift),
        X_previous=size * (draw(2, T, d) + shift),
        X_0=size * (draw(2, T, d) + shift),
        mask=mask,
        logits=sharpness * draw(3, T, T),
        visible=visible,
        V=draw(3, T, d) + shift,
        K=draw(3, T, 3),
        contributions=draw(3, T, d) + shift,
        W_O=draw(d, d),
        readout=draw(d, 3),
    )


_STATES = ("X", "X_previous", "X_0")


def permuted(w: World, seed: int) -> World:
    """Tokens under other labels: states, mask, queries and keys together."""
    p = torch.randperm(w.X.shape[1], generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(
        w,
        **{name: getattr(w, name)[:, p] for name in (*_STATES, "mask", "V", "K", "contributions")},
        logits=w.logits[:, p][:, :, p],
        visible=w.visible[p][:, p],
    )


def rotated(w: World, seed: int) -> World:
    """Vectors in another orthonormal basis."""
    generator = torch.Generator().manual_seed(seed)

    def Q(n):
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q

    R = Q(w.X.shape[-1])
    return dataclasses.replace(
        w,
        **{name: getattr(w, name) @ R for name in (*_STATES, "V", "contributions", "W_O")},
        readout=R.T @ w.readout,
        K=w.K @ Q(w.K.shape[-1]),
    )


def scaled(w: World, factor: float) -> World:
    """Vectors multiplied by a positive number; attention as it was."""
    vectors = (*_STATES, "V", "K", "contributions", "W_O")
    return dataclasses.replace(w, **{name: factor * getattr(w, name) for name in vectors})


CHANGES: dict[str, Callable[[World, int], World]] = {
    "token_permutation": permuted,
    "rotation": rotated,
    "scale": lambda w, seed: scaled(w, 10.0 ** (seed % 7 - 3)),
}


def take(name: str, w: World) -> torch.Tensor:
    """The metric of that name in this world, as a flat float64 tensor."""
    metric = getattr(metrics, name)
    match name:
        case "update_share" | "neighbour_cosine" | "neighbourhood_overlap":
            found = metric(w.X, w.X_previous, w.mask)
        case "span_novelty" | "identity_distance":
            found = metric(w.X, w.X_0, w.mask)
        case "branch_energy" | "contrast_gain":
            found = metric(w.A, w.V, w.visible)
        case "logit_std" | "log_context_gauge" | "max_logit":
            found = metric(w.logits, w.visible)
        case "token_loss":
            found = metric(w.logits, w.logits.argmin(-1))
        case "head_similarity" | "nearest_head_similarity" | "nearest_head":
            found = metric(w.contributions, w.mask[1])
        case "head_ambiguity":
            found = metric(w.W_O, heads=3, tokens=4, readout=w.readout).degrees_of_freedom
        case "unselectable_keys":
            found = metric(w.K)
        case "qk_eigenvalue_variance":
            found = metric(w.W_O[:3], w.W_O[3:6])
        case "value_output_sign":
            found = metric(w.W_O[:3], w.W_O[3:6].mT)
        case _ if metrics.VOCABULARY[name].level == "weight":
            found = metric(w.W_O)
        case "gradient_gain":
            found = metric(w.X_0, w.X, w.mask)
        case "gradient_norm":
            found = metric(w.W_O)
        case "elasticity":
            found = metric(w.contributions, w.V)
        case "elasticity_ratio":
            found = metric(w.X.norm(), w.X_0.norm(), w.V.norm(), w.W_O.norm())
        case "query_key_to_value_output":
            found = metric(w.X[0], w.X_0[0], w.X_previous[0], w.W_O)
        case "gradient_heterogeneity":
            blocks = (w.X, w.X_0, w.V, w.W_O)
            found = metric(torch.stack([G.norm() for G in blocks]), torch.tensor([G.numel() for G in blocks]))
        case "angle_exponent":
            found = metric(metrics.similarity(w.X_0, w.mask), metrics.similarity(w.X, w.mask), layers=3)
        case "gradient_exponent":
            found = metric(metrics.gradient_gain(w.X_0, w.X, w.mask), layers=3)
        case _ if metrics.VOCABULARY[name].level == "attention":
            found = metric(w.A, w.visible)
        case _:
            found = metric(w.X, w.mask)
    return torch.atleast_1d(found).flatten().double()
