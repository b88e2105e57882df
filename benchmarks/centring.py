"""What centring costs at 4096 tokens: a centred forward against the plain one, of an attention module and of a model.

Both sides take turns in one process. Limits: 1.1 times the plain forward where attention is full or causal and nothing
is padded, 1.6 times with a mask that says for every query what it sees.

    python benchmarks/centring.py          # prints the table and writes it to benchmarks/centring.md
"""

import argparse
import copy as copying
from pathlib import Path

import torch
from timing import header, paired
from torch import nn
from torch.nn import functional

import fullrank

TOKENS = 4096
HEADS, WIDTH = 8, 64
LIMITS = {"full": 1.1, "causal": 1.1, "padded": 1.6, "causal and padded": 1.6, "arbitrary": 1.6}


class Attention(nn.Module):
    """An attention module as models have them: projections, the fused kernel, a projection."""

    def __init__(self, width):
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, X, visible=None, causal=False):
        """(sequences, tokens, width) in and out."""
        q, k, v = self.qkv(X).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        Y = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
        return self.output(Y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """X + Attention(X)."""

    def __init__(self, width):
        super().__init__()
        self.attention = Attention(width)

    def forward(self, X, visible=None, causal=False):
        """The stream."""
        return X + self.attention(X, visible, causal)


class Stack(nn.Module):
    """Attention and nothing else, in blocks that capture knows as such."""

    def __init__(self, width, layers=1):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, X, visible=None, causal=False):
        """The stream after the last block."""
        for block in self.blocks:
            X = block(X, visible, causal)
        return X


def module():
    """One attention module with its residual addition."""
    torch.manual_seed(0)
    return Stack(HEADS * WIDTH).eval()


def transformer(mask):
    """Two layers of the reference transformer."""
    from fullrank.zoo import Transformer, TransformerConfig

    kind = "decoder" if "causal" in mask else "encoder"
    sizes = {"depth": 2, "width": HEADS * WIDTH, "heads": HEADS, "mlp_width": 4 * HEADS * WIDTH}
    return Transformer(TransformerConfig(kind=kind, vocabulary=1000, context=TOKENS, **sizes), seed=0).eval()


def masks():
    """What each kind of attention is called with."""
    real = torch.arange(TOKENS) < TOKENS - 100
    lower = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    some = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.7
    some.fill_diagonal_(True)
    return {
        "full": {},
        "causal": {"causal": True},
        "padded": {"visible": real.expand(1, 1, TOKENS, TOKENS).contiguous()},
        "causal and padded": {"visible": (lower & real)[None, None]},
        "arbitrary": {"visible": some[None, None]},
    }


def ratio(model, batch, rounds):
    """Seconds of the plain and of the centred forward."""

    def run():
        with torch.inference_mode():
            model(**batch)

    def centred():
        with torch.inference_mode():
            copy(**batch)

    copy = copying.deepcopy(model)
    with fullrank.repair(copy, "center-attention", batch=batch):
        found = paired({"plain": run, "centred": centred}, rounds=rounds)
    return found["plain"], found["centred"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--note", default="")
    parser.add_argument("--module-only", action="store_true", help="leave the model out")
    options = parser.parse_args()
    lines = [
        f"# Centred attention at {TOKENS} tokens",
        "",
        header() + (f". {options.note}" if options.note else ""),
        "",
        f"A forward with `center-attention` against the plain one, float32, one sequence of {TOKENS} tokens, {HEADS}",
        f"heads of width {WIDTH}; medians of {options.rounds} in turns. The module is projections, the fused kernel",
        "and a projection; the model is the reference transformer with two layers. Padded and arbitrary masks come as",
        "(1, 1, T, T) tensors, as most models make them: what they say costs one product.",
        "",
        "| what | attention | plain: seconds | centred | ratio | limit |",
        "|---|---|---|---|---|---|",
    ]
    over = []
    stack = module()
    X = torch.randn(1, TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(1000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    padding = (torch.arange(TOKENS) < TOKENS - 100).long()[None]
    sides = [("module", name, stack, {"X": X, **more}) for name, more in masks().items()]
    for name in () if options.module_only else ("full", "causal", "padded", "causal and padded"):
        batch = {"input_ids": tokens} | ({"attention_mask": padding} if "padded" in name else {})
        sides.append(("model", name, transformer(name), batch))
    for what, name, model, batch in sides:
        plain, centred = ratio(model, batch, options.rounds)
        lines.append(f"| {what} | {name} | {plain:.3f} | {centred:.3f} | {centred / plain:.2f} | {LIMITS[name]} |")
        print(lines[-1], flush=True)
        if centred / plain > LIMITS[name]:
            over.append(f"{what}, {name}")
    lines += ["", f"Above its limit: {'; '.join(over)}." if over else "All are within their limits."]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
