"""What went into each attention call and what came out of it while a remedy is in force, in dense float64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import kinds
import torch
import transformers as hf
from remedy_patients import Case, stir
from torch import Tensor

import fullrank
from fullrank.capture import survey, undisturbed
from fullrank.edit import rewrite_attention


@dataclass
class Dense:
    """One attention call as the model made it, before any remedy; what the model handed on after all of them.

    Attributes:
        stack: its stack.
        layer: its layer, from 1.
        part: `self`, `cross`.
        s: (batch, heads, queries, keys) scores as they are softmaxed, with the model's biases; −inf where hidden.
        q: (batch, heads, queries, width), or None where the model shows its scores alone.
        k: (batch, heads, keys, width), repeated for every query head, or None.
        v: (batch, heads, keys, width), repeated.
        visible: (batch, heads, queries, keys) bool.
        scale: of the scores.
        input: what the calling module was given.
        output: (batch, heads, queries, width of values), after the remedy.
    """

    stack: str
    layer: int
    part: str
    s: Tensor
    q: Tensor | None
    k: Tensor | None
    v: Tensor
    visible: Tensor
    scale: float
    input: Tensor | None
    output: Tensor

    @property
    def A(self) -> Tensor:
        """The map of the unchanged call."""
        return dense_softmax(self.s)

    @property
    def U(self) -> Tensor:
        """The map that averages what is visible."""
        seen = self.visible.double()
        return seen / seen.sum(-1, keepdim=True).clamp(min=1)


def dense_softmax(s: Tensor) -> Tensor:
    """By definition; a row without a visible key is 0."""
    top = s.amax(-1, keepdim=True)
    e = torch.where(torch.isfinite(s), torch.exp(s - torch.where(torch.isfinite(top), top, 0.0)), 0.0)
    return e / e.sum(-1, keepdim=True).clamp(min=1e-300)


@contextlib.contextmanager
def repaired_and_seen(
    case: Case, remedy: Any, *, stirred: bool = True, **parameters: Any
) -> Iterator[tuple[Any, Callable[[], list[Dense]]]]:
    """A repaired model, and a function that runs it and gives its attention calls.

    The first of several edits sees a call before all others and its output after all others: the one that looks is made
    before the repair, and so knows nothing of it.

    Yields:
        The repair and the function.
    """
    raw: list[tuple[Any, Tensor]] = []
    with undisturbed(case.model), torch.no_grad():
        anatomy = survey(case.model, case)
    started: list[Any] = []

    def before(call: Any) -> Any:
        started.append(call)
        return call

    def after(call: Any, output: Tensor) -> Tensor:
        raw.append((started[-1], output))
        return output

    def calls() -> list[Dense]:
        raw.clear()
        with torch.no_grad():
            case()
        return [_dense(call, output) for call, output in raw]

    with rewrite_attention(case.model, anatomy, before=before, after=after):
        known = {id(p) for p in case.model.parameters()}
        with fullrank.repair(case.model, remedy, batch=case.batch, **parameters) as repair:
            added = {name: p for name, p in case.model.named_parameters() if id(p) not in known}
            if stirred:
                stir(added)
            yield repair, calls


def _dense(call: Any, output: Tensor) -> Dense:
    heads = output.shape[1]
    v = _repeat(call.value, heads).double()
    shape = (output.shape[0], heads, call.queries, call.keys)
    visible = call.visible()
    visible = torch.ones(shape, dtype=torch.bool) if visible is None else visible.expand(shape)
    if call.query is None:
        s, q, k, scale = call.logits.double().expand(shape), None, None, 1.0
    else:
        q, k = call.query.double(), _repeat(call.key, heads).double()
        scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
        s = scale * q @ k.mT
        if call.bias is not None:
            s = s + call.bias.double()
        if call.mask is not None and call.mask.dtype != torch.bool:
            s = s + torch.where(visible, call.mask.double().expand(shape), 0.0)
    s = s.masked_fill(~visible, float("-inf"))
    place = call.place
    given = None if call.input is None else call.input.double()
    return Dense(place.stack, place.layer, place.part, s, q, k, v, visible, scale, given, output.double())


def _repeat(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _windowed(padded: bool = False) -> Case:
    """Mistral: causal, each query sees four keys; padded on the right."""
    config = hf.MistralConfig(**kinds.TEXT, num_key_value_heads=2, sliding_window=4)
    batch: dict[str, Any] = {"input_ids": kinds.ids(), "use_cache": False}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -2:] = 0
    return _drawn(hf.MistralModel(config), batch)


def _drawn(model: Any, batch: dict[str, Any]) -> Case:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return Case(model.double().eval(), batch, 3)


def _kind(name: str, **changes: Any) -> Case:
    kind = kinds.build(name)
    return Case(kind.model, {n: v for n, v in (kind.batch | changes).items() if v is not None}, 3)


def _left_padded() -> Case:
    case = _kind("llama_padded")
    case.batch["attention_mask"] = case.batch["attention_mask"].flip(1)
    return case


MASKS: dict[str, Callable[[], Case]] = {
    "full": functools.partial(_kind, "bert", attention_mask=None),
    "causal": functools.partial(_kind, "llama"),
    "causal, explicit softmax": functools.partial(_kind, "plain_softmax"),
    "padded": functools.partial(_kind, "bert"),
    "causal and padded": functools.partial(_kind, "llama_padded"),
    "causal and padded on the left": _left_padded,
    "causal and padded, explicit softmax": functools.partial(
        _kind, "llama_eager", attention_mask=torch.tensor([[1] * 6 + [0] * 3, [1] * 9, [1] * 8 + [0]])
    ),
    "causal window": _windowed,
    "causal window, padded": functools.partial(_windowed, padded=True),
    "biased": functools.partial(_kind, "t5"),
}
"""Models by what their attention sees. GQA: all llamas and the window; biases: the last."""


def seen_by_hand(name: str, case: Case, queries: int, keys: int) -> Tensor:
    """Who sees whom, (batch or 1, 1, queries, keys), from the padding, causality and window alone, by loops."""
    padding = case.batch.get("attention_mask")
    real = torch.ones(1, keys) if padding is None else padding
    return torch.tensor(
        [
            [
                [
                    bool(row[s]) and (s <= t or "causal" not in name) and (s > t - 4 or "window" not in name)
                    for s in range(keys)
                ]
                for t in range(queries)
            ]
            for row in real
        ]
    )[:, None]


def tolerance(mask: str) -> float:
    """How near an output must come to its definition; eager llamas softmax in float32 whatever their dtype."""
    return 3e-6 if mask == "causal and padded, explicit softmax" else 1e-10


def real_rows(case: Case, call: Dense) -> Tensor:
    """(batch, heads, queries) which queries are real tokens that see something: what is computed for others is free."""
    seen = call.visible.any(-1)
    mask = case.batch.get("attention_mask")
    if mask is not None and call.visible.shape[-2] == mask.shape[1]:
        seen = seen & mask.bool()[:, None, :]
    return seen
