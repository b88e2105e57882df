"""What examining with gradients costs: GPT-2-small at 1024 tokens, against the model's own forward and backward.

Times are of both sides in turns in one process. Peak memory needs a process of its own for each side. The depths tell
whether the cost is linear in them.

    python benchmarks/gradients.py          # prints the table and writes it to benchmarks/gradients.md
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

from timing import header, now_mib, paired

TOKENS = 1024
DEPTHS = (6, 12, 24)
LIMITS = {"time": 2.5, "memory": 1.3}
LIMITED = 12  # layers that GPT-2-small has


def gpt2(layers):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()
    ids = torch.randint(model.config.vocab_size, (1, TOKENS))
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def own(model, batch):
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def examined(model, batch, gradients=True):
    import fullrank

    return fullrank.examine(model, batch, gradients=gradients, spectrum=False, reference=False)


class Peak:
    """The largest resident size while it runs, sampled: the process's own peak is that of the warm-up too."""

    def __enter__(self):
        self.mib, self._stop = now_mib(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.005):
            self.mib = max(self.mib, now_mib())

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()


def memory(side, layers):
    """Extra memory of one call of one side, in this process, beyond model and input."""
    model, batch = gpt2(layers)
    if side != "own":
        import fullrank

        fullrank.examine  # noqa: B018 — what it composes is imported now, not while memory is read
    base = now_mib()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with Peak() as peak:
        own(model, batch) if side == "own" else examined(model, batch)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return max(peak.mib, most if most > before else 0) - base


def times(layers, rounds):
    model, batch = gpt2(layers)
    return paired(
        {
            "own forward and backward": lambda: own(model, batch),
            "examine with gradients": lambda: examined(model, batch),
            "examine without gradients": lambda: examined(model, batch, gradients=False),
        },
        rounds=rounds,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", nargs=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(options.memory[0], int(options.memory[1]))))
        return
    lines = [
        f"# Examining GPT-2-small with gradients at {TOKENS} tokens",
        "",
        header(),
        "",
        f"`GPT2LMHeadModel` of the small configuration with its own loss, float32, one sequence of {TOKENS} tokens, no",
        "singular values. Its own forward and backward against `examine(gradients=True, spectrum=False)`. Extra memory",
        "is the process's peak beyond model and input.",
        "",
        "| layers | own: seconds | examine | ratio | own: extra memory | examine | ratio | without gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seconds = {}
    for layers in DEPTHS:
        start = time.perf_counter()
        found = times(layers, options.rounds)
        extra = {}
        for side in ("own", "examine"):
            command = [sys.executable, __file__, "--memory", side, str(layers)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            extra[side] = json.loads(answer.stdout.splitlines()[-1])
        mine, theirs = found["examine with gradients"], found["own forward and backward"]
        seconds[layers] = mine
        lines.append(
            f"| {layers} | {theirs:.2f} | {mine:.2f} | {mine / theirs:.2f} | {extra['own']:.0f} MiB "
            f"| {extra['examine']:.0f} MiB | {extra['examine'] / extra['own']:.2f} "
            f"| {found['examine without gradients']:.2f} s |"
        )
        print(lines[-1], f"({time.perf_counter() - start:.0f} s)", flush=True)
    steps = list(itertools.pairwise(DEPTHS))
    each = [(seconds[more] - seconds[fewer]) / (more - fewer) for fewer, more in steps]
    costs = [f"{cost:.3f} s between {fewer} and {more}" for cost, (fewer, more) in zip(each, steps, strict=True)]
    lines += [
        "",
        f"Limits: {LIMITS['time']}× the time and {LIMITS['memory']}× the memory at {LIMITED} layers. A further layer "
        f"costs {' and '.join(costs)} layers: ratio {each[-1] / each[0]:.2f}, where 1 is linear.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
