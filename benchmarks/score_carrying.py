"""Scores carried from layer to layer without a score matrix: equal to explicit scores, linear in memory, and its price.

A weighted sum of earlier layers' scores is one call of the fused kernel on concatenated, weighted queries and keys.
Three tables: how far a repaired model of 12 layers is from the same model with explicit scores (float32, 256 tokens);
how the peak memory of a forward of 4 layers grows from 4096 to 16384 tokens, each model in a process of its own, beside
the same model with explicit scores as far as those fit; and what the kernel costs by the number of layers that enter,
beside a plain call (1024 tokens, 4 heads of width 64, causal).

    python benchmarks/score_carrying.py           # prints the tables and writes them to benchmarks/score_carrying.md
    python benchmarks/score_carrying.py --rounds 1  # a quick look, written nowhere
"""

import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

from timing import header, now_mib, paired

CONTEXTS, EXPLICIT = (4096, 8192, 16384), (2048, 4096)
SETTINGS = {
    "Hopfield, α′ = ½": "hopfield",
    "Hopfield, α′ = ½, 2 layers": "hopfield?keep=2",
    "RealFormer, sum": "residual-scores",
    "RealFormer, mean": "residual-scores?kind=mean",
}
LIMIT_ERROR, LIMIT_EXPONENT = 1e-5, 1.15


def model(mask, attention, depth, width=128, heads=2):
    from fullrank.zoo import Transformer, TransformerConfig

    sizes = {"depth": depth, "width": width, "heads": heads, "mlp_width": width}
    config = TransformerConfig(kind="encoder", mask=mask, attention=attention, positions="rotary", **sizes)
    return Transformer(config, seed=0).eval()


def equality():
    """Largest difference of a logit, each rule under each mask."""
    import torch

    import fullrank

    ids = torch.randint(256, (1, 256), generator=torch.Generator().manual_seed(0))
    lines = ["| rule | mask | largest difference |", "|---|---|---|"]
    worst = 0.0
    for name, remedy in SETTINGS.items():
        for mask in ("full", "causal"):
            answers = []
            for attention in ("fused", "explicit"):
                one = model(mask, attention, 12)
                batch = {"input_ids": ids}
                fullrank.repair(one, remedy, batch=batch)
                with torch.no_grad():
                    answers.append(one(**batch).logits)
            far = float((answers[0] - answers[1]).abs().max())
            worst = max(worst, far)
            lines.append(f"| {name} | {mask} | {far:.1e} |")
    return lines, worst


def memory(remedy, attention, contexts):
    """In this process: MiB that forwards of growing length need at their peak, beyond what was there before."""
    import torch

    import fullrank

    torch.set_num_threads(1)
    one = model("causal", attention, 4, width=64, heads=1)
    one.head = torch.nn.Linear(64, 2)  # logits of many words are not what is measured
    found = []
    ids = torch.randint(256, (1, contexts[-1]), generator=torch.Generator().manual_seed(0))
    if remedy:
        fullrank.repair(one, remedy, batch={"input_ids": ids[:, :64]})
    with torch.no_grad():
        one(input_ids=ids[:, :256])
        before = now_mib()
        for tokens in contexts:
            one(input_ids=ids[:, :tokens])
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
    return found


def in_a_process(remedy, attention, contexts):
    asked = json.dumps([remedy, attention, contexts])
    done = subprocess.run([sys.executable, __file__, "--point", asked], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def growth():
    contexts = sorted({*CONTEXTS, *EXPLICIT})
    lines = [
        f"| model | {' | '.join(f'{T} tokens' for T in contexts)} | exponent |",
        f"|{'---|' * (len(contexts) + 2)}",
    ]
    sides = {
        "plain": (None, "fused", CONTEXTS),
        "Hopfield, all 4 layers": ("hopfield", "fused", CONTEXTS),
        "RealFormer": ("residual-scores", "fused", CONTEXTS),
        "Hopfield, explicit scores": ("hopfield", "explicit", EXPLICIT),
    }
    exponents = {}
    for name, (remedy, attention, chosen) in sides.items():
        mib = dict(zip(chosen, in_a_process(remedy, attention, chosen), strict=True))
        first, last = chosen[0], chosen[-1]
        exponents[name] = math.log(mib[last] / mib[first]) / math.log(last / first)
        cells = [f"{mib[T]:.0f} MiB" if T in mib else "" for T in contexts]
        lines.append(f"| {name} | {' | '.join(cells)} | {exponents[name]:.2f} |")
    return lines, max(exponents[name] for name, side in sides.items() if side[0] and side[1] == "fused")


def price(rounds):
    import torch
    from torch.nn import functional

    from fullrank.remedies.attention.carried_scores import coefficients, concatenated, steps

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(8, 1, 4, 1024, 64, generator=g) for _ in range(3))
    attend = functional.scaled_dot_product_attention

    def carried(m):
        counts = coefficients(steps(8, "average"))[-m:]
        Q, K = concatenated(list(q[-m:]), list(k[-m:]), [c / 8 for c in counts], 0.125)
        V = functional.pad(v[-1], (0, Q.shape[-1] - 64))
        return attend(Q, K, V, is_causal=True, scale=0.125)[..., :64]

    sides = {"plain": lambda: attend(q[-1], k[-1], v[-1], is_causal=True)}
    sides |= {m: lambda m=m: carried(m) for m in (1, 2, 4, 8)}
    seconds = paired(sides, rounds=rounds)
    lines = ["| layers that enter | width of the call | time beside a plain call |", "|---|---|---|"]
    lines += [f"| {m} | {64 * m} | {seconds[m] / seconds['plain']:.2f}× |" for m in (1, 2, 4, 8)]
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point:
        print(json.dumps(memory(*json.loads(asked.point))))
        return
    import torch

    torch.set_num_threads(1)
    equal, worst = equality()
    grown, exponent = growth()
    lines = ["# Carried scores", "", header(), "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    lines += [asked.note, ""] if asked.note else []
    lines += [
        "## Equal to explicit scores",
        "",
        *equal,
        "",
        f"Largest: {worst:.1e}; at most {LIMIT_ERROR:g} is asked.",
        "",
    ]
    lines += ["## Memory", "", *grown, "", "Exponent: slope of log MiB against log tokens; "]
    lines[-1] += f"the largest of a fused one is {exponent:.2f}, and at most {LIMIT_EXPONENT:g} is asked."
    lines += ["", "## Time", "", *price(asked.rounds)]
    text = "\n".join(lines) + "\n"
    print(text)
    if asked.rounds > 1:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    if worst > LIMIT_ERROR or exponent > LIMIT_EXPONENT:
        sys.exit("a limit is exceeded")


if __name__ == "__main__":
    main()
