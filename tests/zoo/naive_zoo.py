"""The models of the zoo from their definitions, with loops, in float64; from weights by name, no code shared."""

import cmath
import math
from typing import Any

import torch
from torch import Tensor

from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig


def shaken(model: Any, seed: int = 3) -> Any:
    """In float64 and evaluation mode, every weight moved, so that gains are not 1 nor biases 0."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) * 0.2)
            if name.endswith("running_var"):
                buffer.mul_(1 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return model


def batch_for(config: Any, *, sequences: int = 2, tokens: int = 6) -> dict[str, Tensor]:
    """Something that the model reads."""
    generator = torch.Generator().manual_seed(1)
    if getattr(config, "kind", "") == "vision":
        shape = (sequences, config.channels, config.image, config.image)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(config.vocabulary, (sequences, tokens), generator=generator)}


class Naive:
    """The transformer, one sequence, one head, one query and one key at a time."""

    def __init__(self, model: Transformer) -> None:
        self.config: TransformerConfig = model.config
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch.get("attention_mask")
        return torch.stack([self.one(batch, b, mask) for b in range(len(next(iter(batch.values()))))])

    def one(self, batch: dict[str, Tensor], b: int, mask: Tensor | None) -> Tensor:
        config = self.config
        x = self.tokens(batch, b)
        real = [True] * len(x) if mask is None else [bool(m) for m in mask[b]]
        for layer in range(config.depth):
            x = self.block(f"blocks.{layer}", x, real)
        if config.final_norm:
            x = self.norm("final_norm", x)
        if config.classes:
            kept = [t for t in range(len(x)) if real[t]]
            x = {"mean": sum(x[t] for t in kept) / len(kept), "first": x[kept[0]], "last": x[kept[-1]]}[config.pooling]
        return self.linear("head", x)

    def tokens(self, batch: dict[str, Tensor], b: int) -> Tensor:
        config, w = self.config, self.weights
        if config.kind == "vision":
            image, p = batch["pixel_values"][b], config.patch
            rows = [w["embedding.class_token"]] if config.class_token else []
            for i in range(0, config.image, p):
                for j in range(0, config.image, p):
                    piece = image[:, i : i + p, j : j + p]
                    made = [(w["embedding.patches.weight"][d] * piece).sum() for d in range(config.width)]
                    rows.append(torch.stack(made) + w.get("embedding.patches.bias", 0.0))
            x = torch.stack(rows)
        elif "inputs_embeds" in batch:
            x = batch["inputs_embeds"][b]
        else:
            x = torch.stack([w["embedding.words.weight"][i] for i in batch["input_ids"][b].tolist()])
        if config.positions == "learned":
            x = x + w["embedding.positions.weight"][: len(x)]
        if config.positions == "sinusoidal":
            half = config.width // 2
            angle = [[t / 10000 ** (i / half) for i in range(half)] for t in range(len(x))]
            waves = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angle]
            x = x + torch.tensor(waves, dtype=torch.float64)
        return x

    def block(self, path: str, x: Tensor, real: list[bool]) -> Tensor:
        config = self.config
        s, b = config.skip_scale, config.residual_scale

        def attention(y: Tensor) -> Tensor:
            return self.around(f"{path}.attention", y, lambda z: self.attention(f"{path}.attention.inner", z, real))

        def mlp(y: Tensor) -> Tensor:
            return self.around(f"{path}.mlp", y, lambda z: self.mlp(f"{path}.mlp.inner", z))

        post = config.placement == "post"
        if config.parallel:
            x = s * x + b * attention(x) + b * mlp(x)
            return self.norm(f"{path}.after_attention", x) if post else x
        x = s * x + b * attention(x)
        x = self.norm(f"{path}.after_attention", x) if post else x
        if config.mlp_width:
            x = s * x + b * mlp(x)
            x = self.norm(f"{path}.after_mlp", x) if post else x
        return x

    def around(self, path: str, x: Tensor, inner: Any) -> Tensor:
        placement = self.config.placement
        y = inner(self.norm(f"{path}.before", x) if placement in ("pre", "peri") else x)
        return self.norm(f"{path}.after", y) if placement in ("peri", "res-post") else y

    def attention(self, path: str, x: Tensor, real: list[bool]) -> Tensor:
        config = self.config
        d, T = config.width // config.heads, len(x)
        q, k, v = (self.linear(f"{path}.{name}", x) for name in ("query", "key", "value"))
        group = config.heads // config.key_value_heads
        heads = []
        for h in range(config.heads):
            own, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
            qh, kh, vh = list(q[:, own]), list(k[:, shared]), v[:, shared]
            if config.qk_norm:
                qh = [
                    one / (one.square().mean() + 1e-6).sqrt() * self.weights[f"{path}.query_norm.weight"] for one in qh
                ]
                kh = [one / (one.square().mean() + 1e-6).sqrt() * self.weights[f"{path}.key_norm.weight"] for one in kh]
            if config.positions == "rotary":
                qh, kh = ([turned(one, t) for t, one in enumerate(some)] for some in (qh, kh))
            rows = []
            for i in range(T):
                seen = [j for j in range(T) if self.sees(i, j) and real[j]] or [i]
                e = [math.exp(float(qh[i] @ kh[j]) / math.sqrt(d)) for j in seen]
                rows.append(sum(one * vh[j] for one, j in zip(e, seen, strict=True)) / sum(e))
            heads.append(torch.stack(rows))
        return self.linear(f"{path}.output", torch.cat(heads, -1))

    def sees(self, i: int, j: int) -> bool:
        config = self.config
        if config.mask == "causal":
            return j <= i and (config.window is None or j > i - config.window)
        return config.window is None or 2 * abs(i - j) < config.window

    def mlp(self, path: str, x: Tensor) -> Tensor:
        up = self.linear(f"{path}.up", x)
        hidden = self.phi(self.linear(f"{path}.gate", x)) * up if self.config.gated else self.phi(up)
        return self.linear(f"{path}.down", hidden)

    def phi(self, x: Tensor) -> Tensor:
        return {
            "identity": lambda: x,
            "relu": lambda: (x + x.abs()) / 2,
            "gelu": lambda: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
            "silu": lambda: x / (1 + torch.exp(-x)),
            "tanh": lambda: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
        }[self.config.activation]()

    def linear(self, path: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{path}.weight"].T + self.weights.get(f"{path}.bias", 0.0)

    def norm(self, path: str, x: Tensor) -> Tensor:
        gain, bias = self.weights[f"{path}.weight"], self.weights.get(f"{path}.bias", 0.0)
        if self.config.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        if self.config.norm == "batchnorm":
            mean, var = self.weights[f"{path}.running_mean"], self.weights[f"{path}.running_var"]
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias


def turned(x: Tensor, t: int) -> Tensor:
    """Pairs of features as complex numbers, times e^{iθt}."""
    half = len(x) // 2
    z = [complex(x[i], x[i + half]) * cmath.exp(1j * t / 10000 ** (i / half)) for i in range(half)]
    return torch.tensor([one.real for one in z] + [one.imag for one in z], dtype=torch.float64)


class NaiveStateSpace:
    """The state-space model, one sequence, one token, one feature and one channel at a time."""

    def __init__(self, model: StateSpace) -> None:
        self.config: StateSpaceConfig = model.config
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch.get("attention_mask")
        out = []
        for b, ids in enumerate(batch["input_ids"]):
            x = torch.stack([self.weights["embedding.weight"][i] for i in ids.tolist()])
            real = [1.0] * len(x) if mask is None else mask[b].tolist()
            for layer in range(self.config.depth):
                path, pre = f"blocks.{layer}", self.config.placement == "pre"
                read = self.norm(f"{path}.mixer.before", x) if pre else x
                x = self.config.skip_scale * x + self.mixer(f"{path}.mixer.inner", read, real)
                x = self.norm(f"{path}.after", x) if self.config.placement == "post" else x
            x = self.norm("final_norm", x) if self.config.final_norm else x
            out.append(self.linear("head", x))
        return torch.stack(out)

    def mixer(self, path: str, x: Tensor, real: list[float]) -> Tensor:
        w, config = self.weights, self.config
        u, B, C = self.linear(f"{path}.input", x), None, None
        B, C = self.linear(f"{path}.write", u), self.linear(f"{path}.read", u)
        y = torch.zeros_like(u)
        for f in range(config.width):
            for n in range(config.states):
                h = 0.0
                for t in range(len(x)):
                    bias = w[f"{path}.step.bias"][f]
                    z = float(w[f"{path}.step.weight"][f] @ u[t] + bias) if config.selective else float(bias)
                    delta = math.log1p(math.exp(z))
                    a = math.exp(-delta * math.exp(float(w[f"{path}.decay.log_rate"][f, n])))
                    strength = delta if config.write == "step" else 1 - a
                    h = a * h + strength * float(B[t, n] * u[t, f]) * real[t]
                    y[t, f] += h * float(C[t, n])
        if config.gate:
            gate = self.linear(f"{path}.gate", x)
            y = y * gate / (1 + torch.exp(-gate))
        return self.linear(f"{path}.output", y)

    def linear(self, path: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{path}.weight"].T + self.weights.get(f"{path}.bias", 0.0)

    def norm(self, path: str, x: Tensor) -> Tensor:
        gain, bias = self.weights[f"{path}.weight"], self.weights.get(f"{path}.bias", 0.0)
        if self.config.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias
