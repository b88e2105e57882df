"""How examining one layer grows with the context: time and memory from 4096 to 65536 tokens.

One plain layer of 8 heads of width 64 with causal `scaled_dot_product_attention` and an MLP, float32, one sequence, two
threads; without spectra, and with the spectrum of one chosen head. Every point runs in a process of its own, so that
peak memory can be read; memory is that of the whole process. The exponents are slopes of log seconds and of log memory
beyond the smallest process (model, libraries) against log T, over the longest half of the contexts.

    python benchmarks/long_context.py                   # prints the table and writes it to benchmarks/long_context.md
    python benchmarks/long_context.py --longest 8192    # a quick look, written nowhere
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

from timing import header

SHORTEST, LONGEST = 4096, 65536
HEADS, WIDTH = 8, 64
SIDES = {"plain": "plain forward", "rows": "examine, no spectra", "head": "examine, one head's spectrum"}
LIMIT_TIME, LIMIT_MEMORY, LIMIT_GIB = 2.1, 1.1, 4.0


def layer():
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.norm, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, X):
            B, T, d = X.shape
            q, k, v = (x.view(B, T, HEADS, WIDTH).transpose(1, 2) for x in self.qkv(self.norm(X)).chunk(3, -1))
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            X = X + self.out(heads.transpose(1, 2).reshape(B, T, d))
            return X + self.down(functional.gelu(self.up(self.norm_2(X))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(HEADS * WIDTH)])

        def forward(self, X):
            for block in self.layers:
                X = block(X)
            return X

    torch.manual_seed(0)
    return Model().eval()


def side(name, tokens):
    import torch

    torch.set_num_threads(2)
    model = layer()
    X = torch.randn(1, tokens, HEADS * WIDTH, generator=torch.Generator().manual_seed(1))
    import fullrank

    fullrank.examine  # noqa: B018 — what it composes is imported now, not while it is timed
    start, rows = time.perf_counter(), 0
    if name == "plain":
        with torch.no_grad():
            model(X)
    else:
        how = {"spectrum": False} if name == "rows" else {"heads": ["1.0"]}
        rows = len(fullrank.examine(model, X, reference=False, **how).rows)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "mib": peak, "rows": rows}))


def measure(name, tokens):
    command = [sys.executable, __file__, "--side", name, "--tokens", str(tokens)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def exponent(found, name, key, base=0.0):
    """Least-squares slope of log(value − base) against log T over the longest half."""
    contexts = sorted(found)[len(found) // 2 :] if len(found) > 3 else sorted(found)
    points = [(math.log(T), math.log(max(found[T][name][key] - base, 1e-9))) for T in contexts]
    x_bar, y_bar = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - x_bar) * (y - y_bar) for x, y in points) / sum((x - x_bar) ** 2 for x, _ in points)


def table(found, base):
    lines = [
        f"# One layer at {min(found)} to {max(found)} tokens",
        "",
        header(),
        "",
        f"One plain layer, {HEADS} heads of width {WIDTH}, causal, MLP, float32, one sequence. Memory is the peak of "
        f"the whole process, of which {base:.0f} MiB are libraries and model (a process at 64 tokens); exponents are "
        "of what comes on top, over the longest half.",
        "",
        "| T | " + " | ".join(f"{words}: s | MiB" for words in SIDES.values()) + " |",
        "|---" * (1 + 2 * len(SIDES)) + "|",
    ]
    for T, sides in found.items():
        cells = " | ".join(f"{sides[name]['seconds']:.1f} | {sides[name]['mib']:.0f}" for name in SIDES)
        lines.append(f"| {T} | {cells} |")
    powers = {name: (exponent(found, name, "seconds"), exponent(found, name, "mib", base)) for name in SIDES}
    cells = " | ".join(f"{powers[name][0]:.2f} | {powers[name][1]:.2f}" for name in SIDES)
    lines += [f"| exponent | {cells} |", ""]
    for name in ("rows", "head"):
        gib = found[max(found)][name]["mib"] / 1024
        lines.append(
            f"{SIDES[name]}: time T^{powers[name][0]:.2f} (limit {LIMIT_TIME}), memory T^{powers[name][1]:.2f} (limit "
            f"{LIMIT_MEMORY}), {gib:.2f} GiB at T = {max(found)} (limit {LIMIT_GIB:g})."
        )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--longest", type=int, default=LONGEST)
    options = parser.parse_args()
    if options.side:
        side(options.side, options.tokens)
        return
    base = max(measure(name, 64)["mib"] for name in SIDES)
    found, T = {}, SHORTEST
    while options.longest >= T:
        found[T] = {name: measure(name, T) for name in SIDES}
        print(T, found[T], flush=True)
        T *= 2
    text = table(found, base)
    print(text)
    if options.longest == LONGEST:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
