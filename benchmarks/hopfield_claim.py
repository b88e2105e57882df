"""Do carried scores train better? Hopfield averaging and RealFormer on digits and on text, three seeds each.

The claim (arXiv 2511.20698): averaging attention scores across layers makes vision and language models more accurate
without a parameter. Tried on the reference transformer, 6 blocks, pre-norm: on scikit-learn's digits (8 × 8 pixels, 16
patches; 1000 images to train, 297 to choose the learning rate, 500 to test) and on the texts that ship with the
package (20 KB, bytes as tokens; of every text the last tenth to test, the tenth before it to choose). All variants of a
seed begin with the same weights and see the same batches; each has the better of the learning rates, by what it reaches
on the part kept for choosing with the first seed. Intervals are of the differences from plain attention by seed, 95 %
of Student's t. `α-skip alone` is the control of `Hopfield with α-skip`: x ← αx + (1 − α)Attn with ordinary attention.

    python benchmarks/hopfield_claim.py             # prints the tables and writes them to benchmarks/hopfield_claim.md
    python benchmarks/hopfield_claim.py --steps 20  # a quick look, written nowhere
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from timing import header
from torch.nn import functional

import fullrank
from fullrank.spec.documents import shipped
from fullrank.zoo import Transformer, TransformerConfig

STEPS, SEEDS, RATES = 250, (0, 1, 2), (1e-3, 3e-3)
STUDENT = 4.303  # 97.5 % of t with two degrees of freedom
VARIANTS = {
    "plain": None,
    "Hopfield, α′ = ½": "hopfield?average=0.5",
    "Hopfield with α-skip ½": "hopfield?average=0.5&skip=0.5",
    "α-skip ½ alone": "hopfield?average=0&skip=0.5",
    "RealFormer, sum": "residual-scores?kind=sum",
    "RealFormer, mean": "residual-scores?kind=mean",
}


class Digits:
    """Images of digits, one of ten classes."""

    name, unit = "digits, vision transformer", "accuracy %"

    def __init__(self, seed):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
        y = torch.tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(100 + seed))
        x, y = x[order], y[order]
        self.train, self.choose, self.test = (
            (x[:1000], y[:1000]),
            (x[1000:1297], y[1000:1297]),
            (x[1297:], y[1297:]),
        )

    def model(self, seed):
        """Before training."""
        sizes = {"image": 8, "patch": 2, "channels": 1, "classes": 10}
        return Transformer(TransformerConfig(kind="vision", depth=6, width=48, heads=4, **sizes), seed=seed)

    def batch(self, generator):
        """What a step of training sees."""
        chosen = torch.randint(len(self.train[0]), (48,), generator=generator)
        return {"pixel_values": self.train[0][chosen], "labels": self.train[1][chosen]}

    def score(self, model, part):
        """Loss and percentage right."""
        x, y = getattr(self, part)
        logits = model(pixel_values=x).logits
        return functional.cross_entropy(logits, y).item(), 100 * (logits.argmax(-1) == y).double().mean().item()


class Text:
    """Bytes of text, each told from those before it."""

    name, unit = "text, language model", "next byte right %"
    length = 64

    def __init__(self, seed):
        texts = [torch.tensor(list(text.encode())) for text in shipped(7).texts]
        cuts = [(int(0.8 * len(one)), int(0.9 * len(one))) for one in texts]
        self.train = torch.cat([one[:a] for one, (a, _) in zip(texts, cuts, strict=True)])
        self.choose = self._stretches([one[a:b] for one, (a, b) in zip(texts, cuts, strict=True)])
        self.test = self._stretches([one[b:] for one, (_, b) in zip(texts, cuts, strict=True)])

    def _stretches(self, texts):
        return torch.stack([one for text in texts for one in text.split(self.length) if len(one) == self.length])

    def model(self, seed):
        """Before training."""
        sizes = {"vocabulary": 256, "context": self.length}
        return Transformer(TransformerConfig(kind="decoder", depth=6, width=48, heads=4, **sizes), seed=seed)

    def batch(self, generator):
        """What a step of training sees."""
        at = torch.randint(len(self.train) - self.length, (12, 1), generator=generator)
        ids = self.train[at + torch.arange(self.length)]
        return {"input_ids": ids, "labels": ids}

    def score(self, model, part):
        """Loss and percentage right."""
        ids = getattr(self, part)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        return loss, 100 * (logits.argmax(-1) == ids[:, 1:]).double().mean().item()


def trained(task, seed, remedy, rate, steps):
    """What one variant reaches: scores on the part kept for choosing and on the test."""
    model = task.model(seed)
    batches = torch.Generator().manual_seed(1000 + seed)
    if remedy is not None:
        fullrank.repair(model, remedy, batch=task.batch(torch.Generator().manual_seed(0)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min((n + 1) / warm, max(0.0, (steps - n) / (steps - warm)))
    )
    model.train()
    for _ in range(steps):
        loss = model(**task.batch(batches)).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return {part: task.score(model, part) for part in ("choose", "test")}


def interval(values):
    return statistics.mean(values), STUDENT * statistics.stdev(values) / len(values) ** 0.5


def table(kind, found):
    """Rows of one task; found: variant → (rate, scores by seed)."""
    test = {name: [one["test"] for one in runs] for name, (_, runs) in found.items()}
    lines = [
        f"## {kind.name[0].upper()}{kind.name[1:]}",
        "",
        f"| variant | rate | test loss | against plain | test {kind.unit} | against plain |",
        "|---|---|---|---|---|---|",
    ]
    helped = []
    for name, scores in test.items():
        cells = [name, f"{found[name][0]:g}"]
        for which, digits in ((0, 4), (1, 2)):
            values = [one[which] for one in scores]
            pairs = [one[which] - other[which] for one, other in zip(scores, test["plain"], strict=True)]
            mean, half = interval(pairs)
            cells += [f"{statistics.mean(values):.{digits}f}"]
            cells += ["" if name == "plain" else f"{mean:+.{digits}f} ± {half:.{digits}f}"]
            if which == 0 and name != "plain":
                helped.append((name, mean, half))
        lines.append(f"| {' | '.join(cells)} |")
    better = [name for name, mean, half in helped if mean + half < 0]
    worse = [name for name, mean, half in helped if mean - half > 0]
    lines += [
        "",
        f"Lower loss than plain attention beyond the interval: {', '.join(better) or 'none'}. "
        f"Higher: {', '.join(worse) or 'none'}.",
    ]
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    begun = time.time()
    lines = [
        "# Do carried scores train better?",
        "",
        header(steps=steps, seeds=len(SEEDS), rates=" and ".join(f"{rate:g}" for rate in RATES)),
        "",
        __doc__.split("\n\n")[1].replace("\n", " "),
    ]
    for kind in (Digits, Text):
        found = {}
        for name, remedy in VARIANTS.items():
            first = {rate: trained(kind(SEEDS[0]), SEEDS[0], remedy, rate, steps) for rate in RATES}
            rate = min(RATES, key=lambda one: first[one]["choose"][0])
            runs = [first[rate], *(trained(kind(seed), seed, remedy, rate, steps) for seed in SEEDS[1:])]
            found[name] = rate, runs
            print(json.dumps({"task": kind.name, "variant": name, "rate": rate, "runs": runs}), file=sys.stderr)
        lines += ["", *table(kind, found)]
    lines += ["", f"All of it took {(time.time() - begun) / 60:.0f} minutes."]
    text = "\n".join(lines) + "\n"
    print(text)
    if steps == STEPS:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
