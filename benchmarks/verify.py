"""What testing costs: about a hundred interventions on the pretrained encoder, 8 documents of 256 tokens.

python benchmarks/verify.py             # prints the table and writes it to benchmarks/verify.md
"""

import argparse
import statistics
import time
from pathlib import Path

from timing import header

HEADS = 8
"""Heads of a layer that are silenced one by one."""


def interventions(stack):
    from fullrank.diagnosis import Intervention

    layers = range(1, len(stack.paths) + 1)
    heads = range(min(HEADS, stack.heads))
    return [
        *(Intervention("skip-block", stack.name, layer) for layer in layers),
        *(Intervention("zero-head", stack.name, layer, heads=(head,)) for layer in layers for head in heads),
        *(Intervention("mean-head", stack.name, layer, heads=(h,)) for layer in layers for h in heads[: HEADS // 2]),
        *(Intervention("mask-sink", stack.name, layer) for layer in layers),
        *(Intervention("stream-means", stack.name, layer) for layer in (0, *layers)),
        *(Intervention("deflate-attention", stack.name, layer) for layer in layers),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()

    import torch

    from fullrank.capture import survey, undisturbed
    from fullrank.diagnosis.effects import Trials
    from fullrank.report.verdict import Effect
    from fullrank.spec import inputs, load
    from fullrank.spec.loading import demo
    from fullrank.verbs.batches import as_calls

    subject = load(demo())
    given = inputs(subject, context=options.tokens, documents=options.documents)
    calls = as_calls(subject.model, list(given.batches), known=given.real)
    with undisturbed(subject.model):
        anatomy = survey(subject.model, lambda: calls[0].run(subject.model))
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}

    forwards = []
    with undisturbed(subject.model):
        for _ in range(5):
            start = time.perf_counter()
            for call in calls:
                call.run(subject.model)
            forwards.append(time.perf_counter() - start)
    start = time.perf_counter()
    trials = Trials(subject.model, anatomy, calls)
    seconds = {"the unchanged model": [time.perf_counter() - start]}
    for intervention in interventions(anatomy.stacks[0]):
        start = time.perf_counter()
        effect = trials.effect(intervention)
        seconds.setdefault(intervention.kind, []).append(time.perf_counter() - start)
        assert isinstance(effect, Effect), effect
    after = subject.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    forward = statistics.median(forwards)
    number = sum(map(len, seconds.values())) - 1
    total = sum(map(sum, seconds.values()))
    lines = [
        f"# {number} interventions on the pretrained encoder, {options.documents} documents × {options.tokens} tokens",
        "",
        header(),
        "",
        f"Measured by {trials.words}. A plain forward of the batch: {forward:.2f} s. Altogether: **{total:.1f} s**.",
        "",
        "| intervention | how many | median seconds | forwards |",
        "|---|---|---|---|",
    ]
    for kind, each in seconds.items():
        median = statistics.median(each)
        lines.append(f"| {kind} | {len(each)} | {median:.2f} | {median / forward:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if not options.dry:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
