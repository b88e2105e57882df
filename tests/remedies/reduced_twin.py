"""A vision transformer of the zoo whose tokens are reduced, by loops over images, heads and tokens, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Token:
    """A state with the patches that it stands for; `kind` is `protected`, `patch` or `pooled`."""

    def __init__(self, x, members, kind, window=None):
        self.x, self.members, self.kind, self.window = x, list(members), kind, window


def logits(model, image: Tensor, rule, *, protected: int, omegas=None, compensate=True) -> Tensor:
    """Logits of one image; `rule(layer, tokens, maps, keys)` gives the tokens between attention and MLP."""
    X = model.embedding(image[None])[0]
    kind = ["protected"] * protected + ["patch"] * (len(X) - protected)
    tokens = [Token(x, [i], k) for i, (x, k) in enumerate(zip(X, kind, strict=True))]
    for layer, block in enumerate(model.blocks, 1):
        attention = block.attention.inner
        read = [block.attention.before(t.x) for t in tokens]
        q, k, v = ([_heads(f(x), model) for x in read] for f in (attention.query, attention.key, attention.value))
        maps, wrote = _attend(q, k, v, tokens, None if omegas is None else omegas.get(layer), compensate)
        for t, y in zip(tokens, wrote, strict=True):
            t.x = t.x + attention.output(y.flatten())
        tokens = rule(layer, tokens, maps, k)
        for t in tokens:
            t.x = t.x + block.mlp.inner(block.mlp.before(t.x))
    final = [model.final_norm(t.x) for t in tokens]
    if model.config.pooling == "first":
        return model.head(final[0])
    return model.head(sum(len(t.members) * x for t, x in zip(tokens, final, strict=True)) / len(X))


def _heads(x, model):
    return x.view(model.config.heads, -1)


def _attend(q, k, v, tokens, omega, compensate):
    """Maps (head, query, key) and, after they are weighed by frequency, what each query is given."""
    n, H = len(tokens), q[0].shape[0]
    A = torch.zeros(H, n, n, dtype=torch.float64)
    for h in range(H):
        for i in range(n):
            s = [float(q[i][h] @ k[j][h]) / math.sqrt(q[i].shape[1]) for j in range(n)]
            size = [len(t.members) if compensate else 1 for t in tokens]
            e = [m * math.exp(one - max(s)) for m, one in zip(size, s, strict=True)]
            A[h, i] = torch.tensor(e, dtype=torch.float64) / sum(e)
    weighed = A.clone()
    if omega is not None:
        for h in range(H):
            for j, t in enumerate(tokens):
                low = torch.full((n,), 1 / n, dtype=torch.float64)
                if t.kind == "pooled":
                    weighed[h, :, j] = (1 + omega[1][h]) * A[h, :, j]
                else:
                    weighed[h, :, j] = low + (1 + omega[0][h]) * (A[h, :, j] - low)
    return A, [sum(weighed[:, i, j, None] * v[j] for j in range(n)) for i in range(n)]


def share(keep, layer):
    """Of a number, or of numbers by layer."""
    return keep[layer] if isinstance(keep, dict) else keep


def frequency(steps, *, side, keep, sized, rows=None):
    """`steps`: w by layer; `side`: places of a row, in as many rows if not said.

    Tokens of highest mean attention stay; the others are pooled by windows.
    """

    def rule(layer, tokens, maps, keys):
        if layer not in steps:
            return tokens
        w, n = steps[layer], sum(t.kind != "protected" for t in tokens)
        score = maps.mean((0, 1)) - 1 / len(tokens)
        patches = [j for j, t in enumerate(tokens) if t.kind == "patch"]
        kept = sorted(sorted(patches, key=lambda j: -score[j])[: math.floor(share(keep, layer) * n)])
        fresh = [t for t in tokens if t.kind == "protected"] + [tokens[j] for j in kept]
        everything = [t.x for t in tokens if t.kind != "protected"]
        count = len(fresh) - len(kept)  # protected
        for window in range(w * w):
            total, weight, members = 0, 0, []
            for j, t in enumerate(tokens):
                if t.kind == "protected" or j in kept or not t.members:
                    continue
                if t.kind == "patch":
                    cell = t.members[0] - count
                    place = (cell // side * w // (rows or side)) * w + (cell % side) * w // side
                else:
                    old, wide = t.window
                    place = (old // wide * w // wide) * w + (old % wide) * w // wide
                if place == window:
                    much = len(t.members) if sized else 1
                    total, weight, members = total + much * t.x, weight + much, members + t.members
            x = total / weight if weight else sum(everything) / len(everything)
            fresh.append(Token(x, members, "pooled", (window, w)))
        return fresh

    return rule


def merge(steps, protected):
    """`steps`: r by layer. The most alike of tokens at even places go into their best at an odd place."""

    def rule(layer, tokens, maps, keys):
        if layer not in steps:
            return tokens
        metric = [k.mean(0) for k in keys]
        even = [j for j in range(protected, len(tokens)) if j % 2 == 0]
        odd = [j for j in range(protected, len(tokens)) if j % 2 == 1]
        best = {}
        for i in even:
            cosine = [float(metric[i] @ metric[j] / metric[i].norm() / metric[j].norm()) for j in odd]
            best[i] = max(zip(cosine, odd, strict=True))
        gone = sorted(even, key=lambda i: -best[i][0])[: min(steps[layer], (len(tokens) - protected) // 2)]
        for i in gone:
            into = tokens[best[i][1]]
            a, b = len(tokens[i].members), len(into.members)
            into.x = (a * tokens[i].x + b * into.x) / (a + b)
            into.members = into.members + tokens[i].members
        return tokens[:protected] + [tokens[i] for i in even if i not in gone] + [tokens[j] for j in odd]

    return rule


def prune(layers, protected, keep, fusion):
    """What the class token attends to least is dropped or fused."""

    def rule(layer, tokens, maps, keys):
        if layer not in layers:
            return tokens
        a = maps[:, 0].mean(0)
        others = range(protected, len(tokens))
        kept = sorted(sorted(others, key=lambda j: -a[j])[: math.ceil(share(keep, layer) * len(others))])
        dropped = [j for j in others if j not in kept]
        fresh = tokens[:protected] + [tokens[j] for j in kept]
        if fusion != "none":
            scale = sum(a[j] for j in dropped) if fusion == "normalised" else 1
            x = sum(a[j] * tokens[j].x for j in dropped) / scale
            fresh.append(Token(x, [m for j in dropped for m in tokens[j].members], "patch"))
        return fresh

    return rule
