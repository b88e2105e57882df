"""What an attention call makes of queries and keys: scale, soft-cap, normalisation, rotation, bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fullrank.capture.inputs import softmax_above
from fullrank.capture.lineage import Node, Ref
from fullrank.capture.products import factors_of, is_product
from fullrank.capture.replay import CannotReplay, Replay
from fullrank.capture.weights import Role
from fullrank.measure.block_parts import Parts, Untold

__all__ = ["AttentionForm", "attention_form"]

Bias = Literal["", "alibi", "relative"]

_SMALL, _LARGE = 1e-3, 1e6  # times a query: a soft-cap shows only in the second
_COARSE = 0.25  # in half precision, whose rounding would hide the first
_HIDDEN = -1e4
_SAME = 0.02


@dataclass(frozen=True)
class AttentionForm:
    """One attention call.

    Attributes:
        logit_scale: multiplies the product of what W_Q and W_K make, or of queries and keys at rms 1 with `qk_norm`.
        qk_norm: whether queries and keys are normalised.
        softcap: c of c tanh(s / c); None without.
        value_factor: multiplies the values on their way from W_V to W_O.
        rotary: whether queries are turned by their position.
        bias: what is added to logits by position.
    """

    logit_scale: float
    qk_norm: bool
    softcap: float | None
    value_factor: float
    rotary: bool
    bias: Bias


def attention_form(parts: Parts) -> AttentionForm:
    """Read an attention call.

    Args:
        parts: of its block.

    Returns:
        Its form.

    Raises:
        Untold: where it has another one.
    """
    query, key, value = (parts.inputs.refs[role] for role in ("q", "k", "v"))
    if query is None or key is None or value is None or parts.attended.node is None:
        raise Untold("what its attention was given could not be told")
    if parts.attended.call.sink_column:
        raise Untold("its attention has a sink column")
    given: tuple[tuple[Role, Ref], ...] = (("q", query), ("k", key), ("v", value))
    maps = [parts.map(parts.out(role), ref, features=parts.features(role)) for role, ref in given]
    after = parts.map(parts.attended.node.out, parts.products["o"].reads)
    if maps[0].degree != maps[1].degree or maps[0].degree is None:
        raise Untold("queries and keys are made by something that neither normalises both nor scales both")
    if maps[2].degree != 1 or after.degree != 1:
        raise Untold("values, or what attention returns, are not only scaled between their weights")
    scale, softcap, bias = _kernel(parts, query, key)
    return AttentionForm(
        scale * maps[0].rms * maps[1].rms,
        maps[0].degree == 0,
        softcap,
        maps[2].peak * after.peak,
        _turned(parts, query),
        bias,
    )


def _kernel(parts: Parts, query: Ref, key: Ref) -> tuple[float, float | None, Bias]:
    """Scale, soft-cap and bias between queries and keys and the softmax."""
    node, call = parts.attended.node, parts.attended.call
    assert node is not None
    if not is_product(node):
        width = query.shape[-1]
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        bias = _bias(_known(parts.replay, mask)) if isinstance(mask, Ref) and mask.node.floating else ""
        if call.bias is not None:
            bias = "relative"
        return width**-0.5 if call.scale is None else float(call.scale), call.softcap, bias
    logits = _logits(node)
    content = next((n for n in parts.region.calls if is_product(n) and _multiplies(n, query, key)), None)
    if logits is None or content is None:
        raise Untold("the logits of its attention could not be followed")
    errors: list[str] = []
    for visible in (True, False):  # of masks that are not known it is not known either what they say
        try:
            return _probe(parts, content, logits, query, key, visible)
        except Untold as reason:
            errors.append(str(reason))
    raise Untold(errors[0])


def _multiplies(node: Node, query: Ref, key: Ref) -> bool:
    factors = factors_of(node)
    return factors is not None and set(factors) == {query, key}


def _logits(node: Node) -> Ref | None:
    for factor in factors_of(node) or ():
        softmax = softmax_above(factor)
        if softmax is not None:
            return next((parent for parent in softmax.parents if parent.node.floating), None)
    return None


def _probe(
    parts: Parts, content: Node, logits: Ref, query: Ref, key: Ref, visible: bool
) -> tuple[float, float | None, Bias]:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(ref.shape, generator=draw).to(parts.device, parts.dtype) for ref in (query, key))
    guessed: list[Ref] = []

    def unknown(ref: Ref) -> Tensor:
        guessed.append(ref)
        kind = parts.dtype if ref.node.floating else torch.bool
        return torch.full(ref.shape, 0 if ref.node.floating else visible, dtype=kind, device=parts.device)

    def at(times: float) -> Tensor:
        try:
            return parts.replay(logits, {query: times * q, key: k}, unknown=unknown).float().cpu()
        except CannotReplay as reason:
            raise Untold(f"the logits of its attention could not be computed again: {reason}") from None

    zero, plain = at(0.0), _plain(content, query, key, q, k)
    step = _SMALL if parts.dtype.itemsize > 2 else _COARSE
    small, large = at(step) - zero, at(_LARGE) - zero
    if plain.numel() != small.numel():
        raise Untold("between queries, keys and softmax the logits change their shape")
    plain = plain.reshape(small.shape)
    seen = (zero > zero.amax(-1, keepdim=True) + _HIDDEN) & plain.abs().gt(0.1) & small.isfinite() & large.isfinite()
    if not bool(seen.any()):
        raise Untold("the logits of its attention do not follow queries and keys")
    slope = (small / (step * plain))[seen]
    scale = float(slope.median())
    if float((slope - scale).abs().median()) > _SAME * abs(scale) or not scale:
        raise Untold("the logits of its attention are no multiple of the products of queries and keys")
    capped = float(large[seen].abs().max())
    softcap = None if capped > 0.5 * _LARGE * abs(scale) * float(plain[seen].abs().max()) else capped
    if softcap is not None:
        one = at(1.0) - zero
        wanted = softcap * torch.tanh(scale * plain / softcap)
        if float((one - wanted)[seen].abs().max()) > _SAME * softcap:
            raise Untold("the logits of its attention are bounded by something that is no tanh")
    structured = any(ref.node.stored and ref.node.floating for ref in guessed)
    return scale, softcap, "relative" if structured else _bias(zero)


def _plain(content: Node, query: Ref, key: Ref, q: Tensor, k: Tensor) -> Tensor:
    """Queries times keys, as the model lays the product out."""
    values = {query: q, key: k}
    factors = factors_of(content)
    assert factors is not None
    left, right = (values[ref] for ref in factors)
    if content.name == "einsum":
        found = torch.einsum(content.args[0], left, right)
    else:
        found = left @ right
    return found.float().cpu()


def _known(replay: Replay, ref: Ref) -> Tensor | None:
    try:
        return replay.value(ref).float().cpu()
    except CannotReplay:
        return None


def _bias(added: Tensor | None) -> Bias:
    """What is added to the logits of visible keys: nothing, a multiple of the distance, or something else."""
    if added is None or added.shape[-1] < 4:
        return ""
    rows = added.reshape(-1, added.shape[-2], added.shape[-1])[:, -1]  # the last query sees all that any one sees
    bent = steps = 0.0
    for row in rows:
        row = row[row > row.max() + _HIDDEN]
        if len(row) < 4:
            continue
        first = row.diff()
        steps, bent = max(steps, float(first.abs().max())), max(bent, float(first.diff().abs().max()))
    if steps < 1e-6:
        return ""
    return "alibi" if bent < _SAME * steps else "relative"


def _turned(parts: Parts, query: Ref) -> bool:
    """Whether one and the same vector at every token becomes different queries."""
    start = parts.out("q")
    tokens = parts.sums.stream.shape[-2]
    if start == query or len(start.shape) < 3:
        return False
    one = torch.randn(start.shape[-1], generator=torch.Generator().manual_seed(0)).to(parts.device, parts.dtype)
    run: Callable[[Tensor], Tensor] = lambda z: parts.run(query, {start: z.expand(start.shape).clone()}).float()  # noqa: E731
    made = run(one) - run(torch.zeros_like(one))
    axis = next((axis for axis in (-2, -3, -4) if made.ndim >= -axis and made.shape[axis] == tokens), None)
    if axis is None:
        return False
    spread = (made - made.mean(axis, keepdim=True)).square().mean().sqrt()
    return math.sqrt(float(made.square().mean())) * _SAME < float(spread)
