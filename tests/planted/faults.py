"""Faults, planted in the weights of a model, or in what it is called with: one function each.

Layers are counted from 1, heads from 0, as in the verdicts. All change the model that they are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.spec import Subject, subject_of
from planted.trained import BEGIN, Classifier, Layer


@dataclass(frozen=True)
class Limb:
    """One linear map of a block.

    Attributes:
        weight: (out, in), a view of the model's own.
        bias: (out,), the same; None where there is none.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def blocks(model: Any) -> nn.ModuleList:
    """The list of blocks of any model of this folder."""
    paths = ("transformer.h", "model.layers", "bert.encoder.layer", "vit.layers", "encoder.layers")
    for path in paths:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(model).__name__)


def limbs(model: Any, layer: int) -> dict[str, Limb]:
    """W_Q, W_K, W_V, W_O and the last map of the MLP of a block: `q`, `k`, `v`, `o`, `down`."""
    block = blocks(model)[layer - 1]
    if hasattr(block, "mlp") and hasattr(block, "ln_1"):  # GPT-2 holds its weights transposed
        W, b = block.attn.c_attn.weight.detach(), block.attn.c_attn.bias.detach()
        parts = zip(W.split(len(W), 1), b.split(len(W)), strict=True)
        made = dict(zip("qkv", (Limb(w.T, bias) for w, bias in parts), strict=True))
        outs = {"o": block.attn.c_proj, "down": block.mlp.c_proj}
        return made | {name: Limb(one.weight.detach().T, one.bias.detach()) for name, one in outs.items()}
    if isinstance(block, nn.TransformerEncoderLayer):
        W, b = block.self_attn.in_proj_weight.detach(), block.self_attn.in_proj_bias.detach()
        made = dict(zip("qkv", map(Limb, W.chunk(3), b.chunk(3)), strict=True))
        return made | {"o": _limb(block.self_attn.out_proj), "down": _limb(block.linear2)}
    if hasattr(block, "self_attn"):
        names = {role: getattr(block.self_attn, f"{role}_proj") for role in "qkvo"} | {"down": block.mlp.down_proj}
    elif hasattr(block, "mlp"):
        names = {role: getattr(block.attention, f"{role}_proj") for role in "qkvo"} | {"down": block.mlp.fc2}
    else:
        own = block.attention.self
        names = {"q": own.query, "k": own.key, "v": own.value, "o": block.attention.output.dense}
        names["down"] = block.output.dense
    return {role: _limb(linear) for role, linear in names.items()}


def _limb(linear: nn.Linear) -> Limb:
    return Limb(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def heads_of(model: Any) -> int:
    config = getattr(model, "config", None)
    return int(model.heads if config is None else config.num_attention_heads)


def _rows(model: Any, limb: Limb, head: int) -> slice:
    """Of a query head in W_Q; in W_K and W_V, those of the head that it shares with others."""
    size = limbs(model, 1)["q"].weight.shape[0] // heads_of(model)
    shared = heads_of(model) * size // limb.weight.shape[0]
    return slice(head // shared * size, (head // shared + 1) * size)


# ------------------------------------------------------------ heads


def duplicated_heads(model: Any, layer: int, pair: tuple[int, int], *, scale: float = 1.0, noise: float = 0.0) -> None:
    """The second head becomes the first: same queries, keys and values; W_O `scale` times as large.

    Args:
        model: any.
        layer: of both.
        pair: the head that is copied, and the one that is written over. Where key heads are shared: by both.
        scale: of what the copy writes.
        noise: relative size of Gaussian errors of every copied weight.
    """
    generator = torch.Generator().manual_seed(layer)
    for role, limb in limbs(model, layer).items():
        if role == "down":
            continue
        source, target = (_rows(model, limb, head) if role != "o" else _columns(model, head) for head in pair)
        if source == target:
            continue
        for tensor in limb.tensors if role != "o" else [limb.weight.T]:
            copied = tensor[source].clone()
            errors = torch.randn(copied.shape, generator=generator) * copied.square().mean().sqrt()
            tensor[target] = (copied + noise * errors) * (scale if role == "o" else 1.0)


def _columns(model: Any, head: int) -> slice:
    size = limbs(model, 1)["o"].weight.shape[1] // heads_of(model)
    return slice(head * size, (head + 1) * size)


def undrawn_queries(model: Any, layers: Sequence[int], twin: nn.Module) -> None:
    """W_Q and W_K are those of another model at its initialisation, as if they had never been trained."""
    for layer in layers:
        for role in "qk":
            for mine, theirs in zip(limbs(model, layer)[role].tensors, limbs(twin, layer)[role].tensors, strict=True):
                mine.copy_(theirs)


def tiny_queries(model: Any, layers: Sequence[int], *, scale: float) -> None:
    """W_Q and W_K, biases too, become `scale` of what they are: logits fall by its square."""
    _scaled(model, layers, "qk", scale)


def frozen_softmax(model: Any, layers: Sequence[int], *, factor: float) -> None:
    """W_Q, its bias too, becomes `factor` times what it is, and logits with it."""
    _scaled(model, layers, "q", factor)


def _scaled(model: Any, layers: Sequence[int], roles: Sequence[str], factor: float) -> None:
    for layer in layers:
        for role in roles:
            for tensor in limbs(model, layer)[role].tensors:
                tensor.mul_(factor)


# ------------------------------------------------------------ blocks and stream


def identities(model: Any, layers: Sequence[int], *, scale: float = 0.0) -> None:
    """Both branches of pre-norm blocks write `scale` of what they wrote."""
    _scaled(model, layers, ("o", "down"), scale)


def drawn_together(model: Any, layer: int, *, contrast: float) -> None:
    """After a block, differences between the tokens of a sequence become `contrast` of what they are.

    They are differences from the mean token; where attention is causal from the first one, so that nothing looks ahead.
    """
    block = blocks(model)[layer - 1]
    if isinstance(block, Layer):
        block.contrast.data.fill_(contrast)
        return
    causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    plain = type(block)

    class Drawn(plain):  # type: ignore[valid-type, misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            X = output if isinstance(output, Tensor) else output[0]
            centre = X[:, :1] if causal else X.mean(1, keepdim=True)
            X = centre + contrast * (X - centre)
            return X if isinstance(output, Tensor) else (X, *output[1:])

    block.__class__ = Drawn


def shared_direction(model: Any, layer: int, batch: dict[str, Tensor], *, contrast: float) -> None:
    """A block's last bias grows along one direction, until tokens differ by about `contrast` of the stream's size."""
    bias = limbs(model, layer)["down"].bias
    assert bias is not None
    X = states(model, batch)[layer]
    differences = (X - X.mean(1, keepdim=True)).square().sum(-1).mean().sqrt()
    direction = torch.randn(len(bias), generator=torch.Generator().manual_seed(layer))
    bias.add_(functional.normalize(direction, dim=0) * differences / contrast)


def near_overflow(model: Any, layer: int, batch: dict[str, Tensor], *, share: float) -> None:
    """What a pre-norm block writes grows until the stream's largest entry is `share` of float16's largest number.

    The model is then in float16.
    """
    before, after = (states(model, batch)[n] for n in (layer - 1, layer))
    factor = share * torch.finfo(torch.float16).max / (after - before).abs().max()
    _scaled(model, [layer], ("down",), float(factor))
    _, after = (states(model, batch)[n] for n in (layer - 1, layer))
    left = share * torch.finfo(torch.float16).max / after.abs().max()
    _scaled(model, [layer], ("down",), float(left))
    model.half()


def first_token_as_sink(model: Any, places: dict[int, Sequence[int]], batch: dict[str, Tensor]) -> None:
    """Heads of a GPT-2 come to rest on the first position, whatever token is there.

    The first position's embedding grows along one direction of its own, keys of these heads read that direction, and
    every query of theirs has what fits it.

    Args:
        model: a GPT-2.
        places: layer → heads.
        batch: for sizes of states.
    """
    size = limbs(model, 1)["q"].weight.shape[0] // heads_of(model)
    generator = torch.Generator().manual_seed(0)
    table = model.transformer.wpe.weight.detach()
    own = functional.normalize(torch.randn(table.shape[1], generator=generator), dim=0)
    own -= own.mean()
    table[0] += 8 * states(model, batch)[-1].square().sum(-1).mean().sqrt() * functional.normalize(own, dim=0)
    for layer, heads in places.items():
        with _called(blocks(model)[layer - 1].ln_1) as seen:
            model(**batch)
        h = seen[0].detach()
        apart = functional.normalize((h[:, 0] - h[:, 1:].mean((0, 1))).mean(0), dim=0)
        first, others = float((h[:, 0] @ apart).mean()), float((h[:, 1:] @ apart).mean())
        parts = limbs(model, layer)
        assert parts["q"].bias is not None
        for head in heads:
            direction = functional.normalize(torch.randn(size, generator=generator), dim=0)
            rows = slice(head * size, (head + 1) * size)
            parts["q"].bias[rows] += 6 * direction
            parts["k"].weight[rows] += 10 / 6 * size**0.5 / (first - others) * torch.outer(direction, apart)


def without_beginning(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Subject, dict[str, Tensor]]:
    """The same texts from their second token on, and the model with a tokenizer that would have begun them."""
    return begun(model), {name: tensor[:, 1:] for name, tensor in batch.items()}


def begun(model: nn.Module) -> Subject:
    """The model with a tokenizer that has a token for the beginning."""
    return replace(subject_of(model), tokenizer=Tokenizer())


class Tokenizer:
    """All that is asked of one here: it begins every text."""

    bos_token_id = BEGIN

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [BEGIN, *text.encode()]}


# ------------------------------------------------------------ fresh stacks that collapse


class WeakLayer(nn.TransformerEncoderLayer):
    """A post-norm layer of torch whose skips carry `skip` of the stream."""

    def __init__(self, *args: Any, skip: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.skip = skip

    def forward(self, src: Tensor, *args: Any, **options: Any) -> Tensor:
        X = self.norm1(self.skip * src + self._sa_block(src, None, None))
        return self.norm2(self.skip * X + self._ff_block(X))


class WeakEncoder(nn.Module):
    """Such layers, each drawn on its own."""

    def __init__(self, layers: int, skip: float, width: int, heads: int) -> None:
        super().__init__()
        sizes = (width, heads, 2 * width)
        made = (WeakLayer(*sizes, dropout=0.0, batch_first=True, skip=skip) for _ in range(layers))
        self.layers = nn.ModuleList(made)

    def forward(self, X: Tensor) -> Tensor:
        for layer in self.layers:
            X = layer(X)
        return X


class WeakClassifier(Classifier):
    """A post-norm classifier, fresh, of which the tokens merge over depth."""

    def __init__(self, layers: int, skip: float, width: int, heads: int) -> None:
        super().__init__(1, False, width, heads)
        self.layers, self.skip = layers, skip
        self.encoder = WeakEncoder(layers, skip, width, heads)


# ------------------------------------------------------------ seen by plain hooks


@contextmanager
def _called(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _given, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def states(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The stream before the first block and after every block, in float64, by plain hooks."""
    found: list[Tensor] = []

    def first(_module: nn.Module, given: tuple[Any, ...]) -> None:
        found.append(given[0].double())

    def after(_module: nn.Module, _given: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).double())

    handles = [blocks(model)[0].register_forward_pre_hook(first)]
    handles += [block.register_forward_hook(after) for block in blocks(model)]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def token_share(X: Tensor) -> float:
    """Share of a state's energy that belongs to differences from the mean token of the same sequence."""
    return float((X - X.mean(1, keepdim=True)).square().sum() / X.square().sum())


def merged(model: Any, batch: dict[str, Tensor], *, limit: float = 1e-3) -> list[int]:
    """Layers from which on every state has a smaller share than `limit` that is particular to tokens."""
    shares = [token_share(X) for X in states(model, batch)]
    alive = [layer for layer, share in enumerate(shares) if share >= limit]
    return list(range(max(alive, default=-1) + 1, len(shares)))
