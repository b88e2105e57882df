"""Random transformers written from the block's definition, layer by layer, without any of the library's code."""

import math

import torch
from torch import Tensor, nn

from fullrank.architecture import Architecture

_PHI = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def states(
    one: Architecture, *, seed: int, sequences: int = 2, centred: bool = False, start: Tensor | None = None
) -> list[Tensor]:
    """The stream at every layer of one draw of the weights, (sequences, tokens, width); of `start`, where given."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if start is None else start.dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def norm(X: Tensor) -> Tensor:
        if one.norm == "rmsnorm":
            return X / X.square().mean(-1, keepdim=True).sqrt()
        return nn.functional.layer_norm(X, X.shape[-1:]) if one.norm == "layernorm" else X

    def attention(X: Tensor) -> Tensor:
        written = torch.zeros_like(X)
        sharing = one.heads // one.key_value_heads
        for head in range(one.heads):
            if head % sharing == 0:
                K, V = (std * X @ draw(one.width, one.head_width) for std in (one.std_k, one.std_v))
            Q = one.std_q * X @ draw(one.width, one.head_width)
            if one.qk_norm:
                Q, K = (Z / Z.square().mean(-1, keepdim=True).sqrt() for Z in (Q, K))
            if one.positions == "rotary":
                Q, K = rotated(Q), rotated(K)
            logits = one.logit_scale * Q @ K.mT
            if one.softcap is not None:
                logits = one.softcap * torch.tanh(logits / one.softcap)
            if one.mask == "causal":
                logits = logits.masked_fill(torch.ones_like(logits[0]).triu(1).bool(), -math.inf)
            A = logits.softmax(-1)
            if centred:
                A = A - torch.isfinite(logits).to(A.dtype) / torch.isfinite(logits).sum(-1, keepdim=True)
            written += one.std_o * A @ V @ draw(one.head_width, one.width)
        return written + one.std_bias_attention * draw(one.width)

    def mlp(X: Tensor) -> Tensor:
        up = one.std_up * X @ draw(one.width, one.mlp_width) + one.std_bias_up * draw(one.mlp_width)
        phi = _PHI[one.activation]
        if one.gated:
            gate = one.std_gate * X @ draw(one.width, one.mlp_width) + one.std_bias_up * draw(one.mlp_width)
            hidden = phi(gate) * up
        else:
            hidden = phi(up)
        return one.std_down * hidden @ draw(one.mlp_width, one.width) + one.std_bias_mlp * draw(one.width)

    def added(X: Tensor, *branches: tuple[float, Tensor], skip: float) -> Tensor:
        if one.placement == "peri":
            return skip * X + sum(scale * norm(branch) for scale, branch in branches)
        total = skip * X + sum(scale * branch for scale, branch in branches)
        return norm(total) if one.placement == "post" else total

    def read(X: Tensor) -> Tensor:
        return norm(X) if one.placement in ("pre", "peri") else X

    common, own = draw(sequences, 1, one.width), draw(sequences, one.context, one.width)
    X = one.input_rms * (math.sqrt(one.correlation) * common + math.sqrt(1 - one.correlation) * own)
    X = X if start is None else start
    seen = [X]
    for _ in range(one.depth):
        if one.parallel:
            branches = (one.attention_branch, attention(read(X))), (one.mlp_branch, mlp(read(X)))
            X = added(X, *branches, skip=one.attention_skip)
        else:
            X = added(X, (one.attention_branch, attention(read(X))), skip=one.attention_skip)
            if one.mlp_width:
                X = added(X, (one.mlp_branch, mlp(read(X))), skip=one.mlp_skip)
        seen.append(X)
    return seen


def rotated(Z: Tensor) -> Tensor:
    """Pairs of features turned by position times 10000^(−2i/d)."""
    tokens, width = Z.shape[-2:]
    angle = torch.arange(tokens)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
    planes = torch.view_as_complex(Z.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(planes * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def cosine(X: Tensor) -> float:
    """Mean cosine between different tokens, over sequences, by the T × T matrix."""
    U = X / X.norm(dim=-1, keepdim=True)
    C = U @ U.mT
    T = C.shape[-1]
    return float((C.sum((-2, -1)) - C.diagonal(dim1=-2, dim2=-1).sum(-1)).mean() / (T * (T - 1)))
