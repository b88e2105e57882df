"""Which tokens matter: attention that each one receives, from queries and keys, a block of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.edit import Call

__all__ = ["attention_of_class", "attention_received", "keys_of_tokens"]

_NUMBERS = 1 << 23  # of scores at a time


@torch.no_grad()
def attention_received(call: Call) -> Tensor:
    r"""$\tilde A_k = \frac{1}{nH}\sum_h\sum_q (A^{(h)} - J)_{qk}$: mean attention received, less 1/n.

    Args:
        call: of self-attention without a mask.

    Returns:
        (sequences, tokens) in float32 or wider, adding to 0.
    """
    if call.query is None:
        assert call.logits is not None
        received = _softmax(call.logits).mean((1, 2))
    else:
        q, k = call.query * _scale(call), _keys(call)
        rows = max(1, _NUMBERS // (q.shape[0] * q.shape[1] * k.shape[2]))
        first, *others = (_softmax(_scores(part, k, call)).sum((1, 2)) for part in q.split(rows, 2))
        received = sum(others, first) / (q.shape[1] * q.shape[2])
    return received - 1 / call.keys


def attention_of_class(call: Call) -> Tensor:
    """What the first token attends to, the mean over heads: (sequences, tokens), with its gradients."""
    if call.query is None:
        assert call.logits is not None
        return _softmax(call.logits[:, :, :1]).mean((1, 2))
    return _softmax(_scores(call.query[:, :, :1] * _scale(call), _keys(call), call)).mean((1, 2))


@torch.no_grad()
def keys_of_tokens(call: Call) -> Tensor:
    """The mean over heads of the key of every token: (sequences, tokens, width)."""
    assert call.key is not None
    return call.key.mean(1)


def _scores(q: Tensor, k: Tensor, call: Call) -> Tensor:
    scores = q @ k.mT
    return scores if call.bias is None else scores + call.bias


def _softmax(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)


def _scale(call: Call) -> float:
    assert call.query is not None
    return call.scale if call.scale is not None else call.query.shape[-1] ** -0.5


def _keys(call: Call) -> Tensor:
    assert call.query is not None
    assert call.key is not None
    groups = call.query.shape[1] // call.key.shape[1]
    return call.key if groups == 1 else call.key.repeat_interleave(groups, 1)
