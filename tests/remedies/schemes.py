"""Deep models of the zoo at initialisation, as the cards set them up, and what becomes of tokens in them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

import fullrank
from fullrank.zoo import Transformer, TransformerConfig


def deep(depth: int = 24, *, seed: int = 0, tokens: int = 32, **options: Any) -> tuple[Transformer, Tensor]:
    """d = 128, H = 4, FFN 4d, GELU, no biases, N(0, 1/fan_in); with X_0 ~ N(0, 1) of one sequence."""
    sizes = {"width": 128, "heads": 4, "vocabulary": 128, "biases": False, "positions": "none", "context": tokens}
    model = Transformer(TransformerConfig(depth=depth, **(sizes | options)), seed=seed).eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    return model, torch.randn(1, tokens, model.config.width, generator=generator)


def states(model: Transformer, X: Tensor) -> list[Tensor]:
    """X_0 to X_L of one sequence, (tokens, width), float64."""
    seen = [X]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for block in model.blocks:
            hook = block.register_forward_hook(lambda module, args, output: seen.append(output))
            stack.callback(hook.remove)
        model(inputs_embeds=X)
    return [one[0].double() for one in seen]


def repaired_states(model: Transformer, X: Tensor, remedy: Any, **parameters: Any) -> list[Tensor]:
    with fullrank.repair(model, remedy, batch={"inputs_embeds": X}, **parameters):
        return states(model, X)


def variance(X: Tensor) -> float:
    return float(X.square().mean())


def residual(X: Tensor) -> float:
    """‖(I − J)X‖/‖X‖."""
    return float((X - X.mean(0)).norm() / X.norm())


def cosine(X: Tensor) -> float:
    """Mean over pairs of different tokens."""
    T = len(X)
    unit = X / X.norm(dim=-1, keepdim=True)
    return float(((unit @ unit.T).sum() - T) / (T * (T - 1)))


def gradients(model: Transformer, X: Tensor, *, seed: int = 0) -> list[float]:
    """[Gini of per-matrix RMS gradients, mean RMS of q and k over that of v and o, ‖dX_1‖/‖dX_L‖], random target."""
    generator = torch.Generator().manual_seed(2000 + seed)
    labels = torch.randint(model.config.vocabulary, X.shape[:2], generator=generator)
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    model(inputs_embeds=X, labels=labels).loss.backward()
    for hook in hooks:
        hook.remove()
    names = ("query", "key", "value", "output", "up", "down")
    rms = {
        name: float(p.grad.double().square().mean().sqrt())
        for name, p in model.blocks.named_parameters()
        if name.endswith(tuple(f"{one}.weight" for one in names))
    }
    qk, vo = (
        sum(v for n, v in rms.items() if n.endswith(tuple(f"{one}.weight" for one in pair)))
        for pair in (("query", "key"), ("value", "output"))
    )
    model.zero_grad(set_to_none=True)
    ends = [float(seen[index].grad.double().norm()) for index in (0, -1)]
    return [gini(list(rms.values())), qk / vo, ends[0] / ends[1]]


def gini(values: list[float]) -> float:
    """Mean difference of two over twice their mean."""
    x = torch.tensor(values, dtype=torch.float64)
    return float((x[:, None] - x[None]).abs().mean() / (2 * x.mean()))
