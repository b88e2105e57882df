"""Fewer tokens in a vision transformer: multiply-accumulates, accuracy and throughput of three ways at equal cost.

A small transformer is trained on scikit-learn's digits, enlarged to 32 × 32 pixels; it meets frequency, merge and prune
as it is, and after tuning with each. Throughput is that of a model of DeiT-S's size at the schedule of the paper.

    python benchmarks/token_reduction.py            # both parts; writes benchmarks/token_reduction.md
    python benchmarks/token_reduction.py --accuracy # or --throughput: one part; the other is left as it stands
"""

import argparse
import copy
import json
import math
from pathlib import Path
from statistics import mean, stdev

from parts import written
from timing import header, paired

HERE = Path(__file__).with_suffix(".md")
PARTS = ("## Accuracy", "## Throughput")
SEEDS = (0, 1, 2)
KEEPS = (0.7, 0.4)
EPOCHS, TUNING, BATCH = 10, 1, 64
AT_ONCE = (8, 32)  # images in a forward; with few, products of fewer rows lose what they save
LEAST = 1.3  # times the images a second, at the paper's schedule


def digits():
    """Images (1797, 1, 32, 32) and labels in an order of their own; the last 397 are held out."""
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def small(seed):
    from fullrank.zoo import Transformer, TransformerConfig

    config = TransformerConfig(
        kind="vision", depth=6, width=48, heads=4, image=32, patch=4, channels=1, class_token=True, pooling="first"
    )
    return Transformer(config, seed=seed)


def train(model, data, epochs, rate, seed):
    """AdamW with a rate that falls as a cosine; seconds do not matter here."""
    import torch

    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=generator).split(BATCH):
            optimiser.zero_grad()
            model(pixel_values=images[part], labels=labels[part]).loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def accuracy(model, data):
    import torch

    images, labels = data
    with torch.inference_mode():
        return float((model(pixel_values=images).logits.argmax(-1) == labels).float().mean())


def methods(keep, model, tokens):
    """Each way with the parameters at which it costs as much as frequency, or as little less as it can."""
    from fullrank.remedies.tokens.token_schedule import Reducing, quarters, token_course, token_macs

    depth, width = model.config.depth, model.config.width
    layers = quarters(depth)

    def cost(steps):
        return token_macs(token_course(tokens, steps, depth=depth), width=width)

    frequency = {layer: Reducing("frequency", keep, w * w) for layer, w in zip(layers, (2, 1, 1), strict=True)}
    shares = (share / 1000 for share in range(999, 0, -1))
    fitting = (s for s in shares if cost({n: Reducing("prune", s, 1) for n in layers}) <= cost(frequency))
    return {
        "frequency": {"keep": keep},
        "merge": {"keep": keep, "method": "merge"},
        "prune": {"keep": next(fitting), "method": "prune"},
    }


def learnt(seed):
    """Accuracy of a model, and at each keep of the model with each way to reduce, before and after tuning."""
    import fullrank

    data, held_out = digits()
    model = small(seed)
    train(model, data, EPOCHS, 2e-3, seed)
    plain = copy.deepcopy(model)
    train(plain, data, TUNING, 5e-4, seed)
    found = [{"keep": 1.0, "method": "none", "before": accuracy(model, held_out), "after": accuracy(plain, held_out)}]
    batch = {"pixel_values": held_out[0][:2]}
    for keep in KEEPS:
        for name, parameters in methods(keep, model, 65).items():
            reduced = copy.deepcopy(model)
            repair = fullrank.repair(reduced, "reduce-tokens", batch=batch, **parameters)
            row = {"keep": keep, "method": name, "before": accuracy(reduced, held_out)}
            train(reduced, data, TUNING, 5e-4, seed)
            row |= {
                "after": accuracy(reduced, held_out),
                "note": repair.notes[0].split(": ", 1)[1],
                "rate": rate(model, reduced, held_out),
            }
            found.append(row)
    return found


def rate(model, reduced, data, rounds=7):
    """How many times the images a second."""
    import torch

    def run(one):
        with torch.inference_mode():
            one(pixel_values=data[0][:64])

    seconds = paired({"plain": lambda: run(model), "less": lambda: run(reduced)}, rounds=rounds)
    return seconds["plain"] / seconds["less"]


def throughput(rounds):
    """Seconds of forwards by a model of DeiT-S's size, and with each way to reduce."""
    import torch

    import fullrank
    from fullrank.zoo import Transformer, TransformerConfig

    config = TransformerConfig(
        kind="vision",
        depth=12,
        width=384,
        heads=6,
        image=224,
        patch=16,
        classes=1000,
        class_token=True,
        pooling="first",
    )
    model = Transformer(config, seed=0).eval()
    images = torch.randn(max(AT_ONCE), 3, 224, 224, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": images[:1]}
    models, notes = {"none": model}, {"none": ""}
    for name, parameters in (methods(0.7, model, 197) | {"frequency, no ω": {"reweigh": False}}).items():
        models[name] = copy.deepcopy(model)
        notes[name] = (
            fullrank.repair(models[name], "reduce-tokens", batch=batch, **parameters).notes[0].split(": ", 1)[1]
        )

    def run(one, number):
        with torch.inference_mode():
            one(pixel_values=images[:number])

    def timed(number):
        return paired({name: lambda one=one: run(one, number) for name, one in models.items()}, rounds=rounds)

    seconds = {number: timed(number) for number in AT_ONCE}
    return [
        {"method": name, "seconds": {number: seconds[number][name] for number in AT_ONCE}, "note": notes[name]}
        for name in models
    ]


ABOUT_ACCURACY = f"""\
Six blocks of width 48 over 64 patches and a class token, trained for {EPOCHS} epochs on 1,400 of scikit-learn's digits
enlarged to 32 × 32 pixels, tested on the other 397; {len(SEEDS)} seeds, mean ± deviation. Reductions after each
quarter of the depth; `merge` in every block. `merge` and `prune` are given as many multiply-accumulates as `frequency`
has, or just fewer, by the formula that leaves out what choosing tokens costs; the table counts the products that
happen, those that choose included, for one image. Tuned: with the reduction in force, and the model without one
likewise, epochs more: {TUNING}."""

ABOUT_THROUGHPUT = f"""\
Twelve blocks of width 384, 197 tokens, float32, reductions in blocks 4, 7 and 10 that keep 70 % (`merge`
in every block) at equal cost; random weights. Sides take turns; medians. Wanted: {LEAST} times the images a second."""


def accuracy_table(seeds):
    lines = ["| keep | tokens go by | multiply-accumulates | images a second | accuracy as it is, % | tuned, % |"]
    lines.append("|---|---|---|---|---|---|")
    for rows in zip(*seeds, strict=True):
        first = rows[0]
        cost, times = "all", "1.00 ×"
        if "note" in first:
            cost = first["note"].split(" multiply")[0] + f" ({first['note'].split('(')[1].split(')')[0]})"
            times = f"{mean(row['rate'] for row in rows):.2f} ×"
        before, after = (percent([row[key] for row in rows]) for key in ("before", "after"))
        lines.append(f"| {first['keep']:g} | {first['method']} | {cost} | {times} | {before} | {after} |")
    return lines


def percent(values):
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def throughput_table(rows):
    head = " | ".join(f"seconds of {number} images | images a second" for number in AT_ONCE)
    lines = [f"| tokens go by | multiply-accumulates | tokens | {head} |", "|---|---|---|" + "---|---|" * len(AT_ONCE)]
    for row in rows:
        cost, tokens = "all", "197"
        if row["note"]:
            cost = row["note"].split(" multiply")[0] + f" ({row['note'].split('(')[1].split(')')[0]})"
            tokens = row["note"].split("tokens ")[-1].rstrip(".")
        times = " | ".join(
            f"{row['seconds'][number]:.3f} | {rows[0]['seconds'][number] / row['seconds'][number]:.2f} ×"
            for number in AT_ONCE
        )
        lines.append(f"| {row['method']} | {cost} | {tokens} | {times} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    both = asked.accuracy == asked.throughput
    new = {}
    if both or asked.accuracy:
        seeds = []
        for seed in SEEDS:
            seeds.append(learnt(seed))
            print(json.dumps(seeds[-1], indent=1), flush=True)
        new[PARTS[0]] = "\n\n".join([header(), ABOUT_ACCURACY, "\n".join(accuracy_table(seeds))])
    if both or asked.throughput:
        new[PARTS[1]] = "\n\n".join([header(), ABOUT_THROUGHPUT, "\n".join(throughput_table(throughput(asked.rounds)))])
    print(written(HERE, "Fewer tokens in a vision transformer", PARTS, new))


if __name__ == "__main__":
    main()
