"""What a backward brings: sizes of gradients, over depth and over parameters.

G is a gradient laid out as what it is of: (tokens, width) for a state, (tokens, head width) for a head's queries, the
shape of the weight W for ∂W. All but `gradient_rms`, `gradient_norm` and `elasticity` are ratios: a loss scale drops
out of them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fullrank.errors import BatchError
from fullrank.metrics.accumulate import balanced, floor, real_tokens
from fullrank.metrics.tokens import rms

__all__ = [
    "angle_exponent",
    "elasticity",
    "elasticity_ratio",
    "from_squares",
    "gradient_exponent",
    "gradient_gain",
    "gradient_heterogeneity",
    "gradient_norm",
    "gradient_rms",
    "query_key_to_value_output",
]

_PIECE = 1 << 20


def gradient_rms(
    G: Float[Tensor, "*batch tokens width"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Root mean square of the entries of a gradient over real tokens: √(Σ g² / (T d)).

    Range [0, ∞), in the units of the loss over those of the state; a loss scale multiplies it. Source: noci
    (2206.03126). O(T d).
    """
    return rms(G, mask)


def gradient_gain(
    G: Float[Tensor, "*batch tokens width"],
    G_L: Float[Tensor, "*batch tokens width"],
    mask: Bool[Tensor, "*batch tokens"] | None = None,
) -> Float[Tensor, "*batch"]:
    """How much larger a gradient is than that at the last layer: ‖G‖_F / ‖G_L‖_F over real tokens.

    Range [0, ∞); 1 at the last layer, and everywhere in a network that rotates its states; NaN where no gradient
    reaches the last layer. Invariant to the scale of the loss, to token order and rotation. Source:
    residual_scaling (first-to-last ratio). O(T d).
    """
    G, _ = real_tokens(G, mask)
    G_L, _ = real_tokens(G_L, mask)
    (G, unit), (G_L, unit_L) = balanced(G), balanced(G_L)
    norm, norm_L = (torch.linalg.vector_norm(X, dim=(-2, -1)) for X in (G, G_L))
    gain: Tensor = norm / norm_L * (unit / unit_L)[..., 0, 0]
    return gain


def gradient_norm(G: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Frobenius norm of one tensor's gradient, ‖G‖_F = √Σ g².

    Range [0, ∞); a loss scale multiplies it; 0 where the loss does not depend on the tensor. In float64, whatever the
    dtype of G. O(P) for P entries.
    """
    # float64, piece by piece: float32 sums of 10⁷ squares err by parts in a thousand, and a copy would be as large as G
    pieces = G.split(max(1, _PIECE * len(G) // max(1, G.numel()))) if G.ndim else (G,)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def elasticity(W: Float[Tensor, "*shape"], G: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """How much the loss can change with a relative change of a weight: ‖W‖_F ‖∂W‖_F.

    By Cauchy and Schwarz |dL| ≤ ‖∂W‖ ‖dW‖, so that a step of relative size ε = ‖dW‖/‖W‖ changes the loss by at most
    ε times this. Range [0, ∞), in the units of the loss; unlike the norm of the gradient it stays the same where a
    weight is multiplied by c and what it feeds divided by c. O(P).
    """
    return gradient_norm(W) * gradient_norm(G)


def elasticity_ratio(
    e_q: Float[Tensor, "*batch"],
    e_k: Float[Tensor, "*batch"],
    e_v: Float[Tensor, "*batch"],
    e_o: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Elasticity of queries and keys over that of values and output: √(e_q² + e_k²) / √(e_v² + e_o²).

    Range [0, ∞). 0 at rank collapse, where attention no longer depends on queries and keys: with them the Q and K
    gradients vanish like (1 − ρ)² while those of V grow (noci, 2206.03126). Invariant to the scale of the loss and to
    scales that one weight hands to the next. O(1).
    """
    return torch.hypot(e_q, e_k) / torch.hypot(e_v, e_o)


def query_key_to_value_output(
    G_q: Float[Tensor, "_ _"], G_k: Float[Tensor, "_ _"], G_v: Float[Tensor, "_ _"], G_o: Float[Tensor, "_ _"]
) -> Float[Tensor, ""]:
    """Root mean square of the gradients of W_Q and W_K over that of W_V and W_O, entries pooled.

    √((‖∂W_Q‖² + ‖∂W_K‖²)/(P_Q + P_K)) / √((‖∂W_V‖² + ‖∂W_O‖²)/(P_V + P_O)). Range [0, ∞); 0 at rank collapse (noci,
    2206.03126; gradient_heterogeneity, 2502.00213); default initialisations give .02 to .2 and train. Invariant to
    the scale of the loss. O(P).
    """
    four = (G_q, G_k, G_v, G_o)
    return from_squares([gradient_norm(G).square() for G in four], [G.numel() for G in four])


def from_squares(squares: Sequence[Float[Tensor, "*batch"]], sizes: Sequence[int]) -> Float[Tensor, "*batch"]:
    """`query_key_to_value_output` of gradients of which no more than the sizes is kept. O(1).

    Args:
        squares: ‖∂W‖² of W_Q, W_K, W_V and W_O.
        sizes: P of each, the number of entries.
    """
    q, k, v, o = squares
    P_q, P_k, P_v, P_o = sizes
    return (((q + k) / (P_q + P_k)) / ((v + o) / (P_v + P_o))).sqrt()


def gradient_heterogeneity(norms: Float[Tensor, "blocks"], sizes: Tensor) -> Float[Tensor, ""]:
    """Gini coefficient of x_b = ‖g_b‖/√P_b over parameter tensors b of P_b entries: Σ_ab |x_a − x_b| / (2 n² x̄).

    Range [0, 1 − 1/n]: 0 when all tensors have gradients of one size, 1 − 1/n when one has all. Source:
    gradient_heterogeneity (2502.00213), for which uneven gradients hurt SGD and not Adam. Invariant to the scale of
    the loss and to the order of the tensors. NaN without a gradient. O(n log n).

    Args:
        norms: ‖g_b‖.
        sizes: P_b, the number of entries.

    Raises:
        BatchError: where there are not as many sizes as norms.
    """
    if norms.shape != sizes.shape:
        raise BatchError(f"sizes has shape {tuple(sizes.shape)}; for {norms.numel()} norms it must have the same.")
    x = (norms.double() / sizes.double().sqrt()).sort().values
    n = x.numel()
    place = torch.arange(1, n + 1, device=x.device, dtype=x.dtype)
    # Σ_ab |x_a − x_b| = 2 Σ_i (2 i − n − 1) x_(i) for ascending x_(i)
    return (((2 * place - n - 1) * x).sum() / (n * x.sum())).clamp(min=0)  # rounding only


def angle_exponent(
    rho_0: Float[Tensor, "*batch"], rho_L: Float[Tensor, "*batch"], *, layers: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "*batch"]:
    """λ_a over a finite depth: (1/L) log((1 − ρ_L)/(1 − ρ_0)), ρ the mean cosine of the tokens before and after.

    Negative where tokens merge (ordered), positive where they move apart (chaotic). The exponent of cowsik
    (2403.02579) is the limit of nearly equal tokens, ρ → 1, and is local: far from it this is the mean rate over the
    stack and says how fast the tokens at hand approach each other. NaN where 1 − ρ is rounding. O(1).

    Args:
        rho_0: `similarity` of the first state.
        rho_L: of the last state.
        layers: L.
        dtype: the model computes in it; below its floor 1 − ρ is rounding.

    Raises:
        BatchError: where there is no layer.
    """
    if layers < 1:
        raise BatchError(f"layers={layers}; an exponent needs at least one.")
    apart_0, apart_L = 1 - rho_0.double(), 1 - rho_L.double()
    # 1 − ρ is quadratic in what is left of the tokens after their mean; and ρ itself is rounded
    least = max(floor(dtype) ** 2, floor(torch.float64 if dtype == torch.float64 else torch.float32))
    known = (apart_0 > least) & (apart_L > least)
    return torch.where(known, (apart_L / apart_0).log() / layers, torch.nan)


def gradient_exponent(gain_0: Float[Tensor, "*batch"], *, layers: int) -> Float[Tensor, "*batch"]:
    """λ_g over a finite depth: (1/L) log(‖∂/∂X_0‖² / ‖∂/∂X_L‖²) = (2/L) log of the `gradient_gain` at layer 0.

    With the projection ⟨R, X_L⟩ on a random R of unit norm it is (1/L) log ‖∂⟨R, X_L⟩/∂X_0‖² (cowsik, 2403.02579).
    Positive where gradients explode backwards, negative where they vanish, 0 where the network trains best. Invariant
    to the scale of the loss. O(1).

    Args:
        gain_0: `gradient_gain` of the first state.
        layers: L.

    Raises:
        BatchError: where there is no layer.
    """
    if layers < 1:
        raise BatchError(f"layers={layers}; an exponent needs at least one.")
    return 2 / layers * gain_0.log()
