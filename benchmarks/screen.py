"""screen on a deep post-norm model at initialisation: six candidates untrained, then trained with three seeds.

python benchmarks/screen.py              # both tables, to benchmarks/screen.md
python benchmarks/screen.py --untrained  # or --trained: one of them; the other is left as it stands
"""

import argparse
import time
from pathlib import Path

from parts import written
from timing import header

HERE = Path(__file__).with_suffix(".md")
PARTS = ("## Without training", "## With training")
CANDIDATES = (
    "residual-scale",
    "deepnorm",
    "lambda-skip?strength=4",
    "center-attention",
    "value-residual?kind=fixed",
    "rezero",
)
"""What is said to help against rank collapse in depth, and one that makes the network the identity at first."""


def network(depth, width, context, seed=0):
    from fullrank.zoo import Transformer, TransformerConfig

    config = TransformerConfig(
        kind="decoder", depth=depth, width=width, heads=2, vocabulary=32, context=context, placement="post"
    )
    return Transformer(config, seed=seed)


def shown(value):
    return "–" if value is None else f"{value:.3g}"


def untrained(found):
    numbers = [(one.metric, one.place) for one in found.as_it_is.restored]
    lines = ["| variant | group | " + " | ".join(", ".join(one) for one in numbers) + " | distance from the identity |"]
    lines.append("|---|---|" + "---:|" * (1 + len(numbers)))
    for row in found.rows:
        restored = {(one.metric, one.place): f"{shown(one.before)} → {shown(one.after)}" for one in row.restored}
        cells = " | ".join(restored.get(one, "–") for one in numbers)
        lines.append(f"| {row.variant} | {row.group} | {cells} | {shown(row.identity_distance)} |")
    return lines


def trained(found):
    lines = [
        "| place | variant | loss after training | against the model as it is (95 %) | trains | best rate | widest "
        "rate | parameters added | time per step |",
        "|---:|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in found.rows:
        rank = found.rank(row)
        change = (
            "" if row.change is None else f"{row.change.mean:+.3f} ({row.change.low:+.3f} to {row.change.high:+.3f})"
        )
        widest = "–" if row.widest_rate is None else f"{row.widest_rate:g}"
        ratio = "1" if row.seconds_ratio is None else f"{row.seconds_ratio:.2f}"
        lines.append(
            f"| {'–' if rank is None else rank} | {row.variant} | {row.loss:.3f} | {change} | "
            f"{'yes' if row.trained else 'no'} | {row.learning_rate:g} | {widest} | {row.extra_parameters} | {ratio}× |"
            if row.loss is not None
            else f"| – | {row.variant} | – | {row.note} | | | | | |"
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=48)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--trained", action="store_true")
    options = parser.parse_args()
    both = options.untrained == options.trained

    import torch

    import fullrank

    model = network(options.depth, options.width, options.context)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(0, 32, (8, options.context), generator=generator)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    machine = header(width=options.width, tokens=options.context)
    new = {}
    if both or options.untrained:
        start = time.perf_counter()
        found = fullrank.screen(model, batch, remedies=CANDIDATES)
        taken = f"{time.perf_counter() - start:.0f} s for the model as it is, its verdicts and six candidates."
        new[PARTS[0]] = "\n".join([machine, "", taken, found.said, "", *untrained(found)])
    if both or options.trained:
        start = time.perf_counter()
        asked = {"remedies": CANDIDATES, "steps": options.steps, "seeds": tuple(range(options.seeds))}
        found = fullrank.screen(model, batch, **asked, progress=say)
        taken = (
            f"{options.steps} steps, {options.seeds} seeds, each at the best of a few learning rates: "
            f"{time.perf_counter() - start:.0f} s. {found.about['task']}; chance {found.about['chance']:.3f}. "
            "Ranked by loss and by nothing else."
        )
        new[PARTS[1]] = "\n".join([machine, "", taken, "", *trained(found)])
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    title = f"Six candidates on a post-norm decoder of {options.depth} layers at initialisation"
    print(written(HERE, title, PARTS, new))


def say(what, share):
    print(f"{share:4.0%} {what}", flush=True)


if __name__ == "__main__":
    main()
