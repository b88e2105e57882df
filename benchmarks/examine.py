"""What examining costs: a GPT-2-small configuration at 4096 tokens, against a plain forward and against eager maps.

Every side runs in a process of its own, one after the other, so that peak memory can be read. The dense side needs one
`svdvals` for each of 144 maps; three are timed and the rest extrapolated, which the table says.

    python benchmarks/examine.py            # prints the table and writes it to benchmarks/examine.md
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from timing import header, now_mib

TOKENS = 4096
HEADS_TIMED = 3


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def side(name, tokens):
    import torch
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_positions=tokens, attn_implementation="eager" if name == "eager" else "sdpa")
    model = GPT2Model(config).eval()
    ids = torch.randint(config.vocab_size, (1, tokens))
    if name.startswith("examine"):
        import fullrank

        fullrank.examine  # noqa: B018 — what it composes is imported now, not while it is timed
    base, start, note = now_mib(), time.perf_counter(), ""
    with torch.no_grad():
        if name == "plain":
            model(input_ids=ids, use_cache=False)
        elif name == "eager":
            maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
            forward = time.perf_counter() - start
            peak = peak_mib() - base
            start = time.perf_counter()
            for head in range(HEADS_TIMED):
                torch.linalg.svdvals(maps[0][0, head])
            per_head = (time.perf_counter() - start) / HEADS_TIMED
            heads = config.n_layer * config.n_head
            note = f"forward {forward:.1f} s + {heads} × {per_head:.2f} s ({HEADS_TIMED} timed)"
            print(json.dumps({"seconds": forward + heads * per_head, "extra": peak, "note": note}))
            return
        else:
            report = fullrank.examine(model, {"input_ids": ids}, spectrum=name == "examine", reference=False)
            note = f"{len(report.rows)} rows"
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "extra": peak_mib() - base, "note": note}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()
    if options.side:
        side(options.side, options.tokens)
        return
    found = {}
    for name in ("plain", "examine without spectra", "examine", "eager"):
        command = [sys.executable, __file__, "--side", name, "--tokens", str(options.tokens)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(answer.stdout.splitlines()[-1])
    labels = {"eager": "eager maps + dense svdvals"}
    lines = [
        "# Examining GPT-2-small at 4096 tokens".replace("4096", str(options.tokens)),
        "",
        header(),
        "",
        "`GPT2Model` of the small configuration (12 layers, 12 heads, width 768), float32, one sequence of "
        f"{options.tokens} tokens. Extra memory is the process's peak beyond model and input.",
        "",
        "| side | seconds | × plain forward | extra memory | × plain forward | |",
        "|---|---|---|---|---|---|",
    ]
    plain = found["plain"]
    for name, one in found.items():
        lines.append(
            f"| {labels.get(name, name)} | {one['seconds']:.1f} | {one['seconds'] / plain['seconds']:.1f} "
            f"| {one['extra']:.0f} MiB | {one['extra'] / plain['extra']:.2f} | {one['note']} |"
        )
    ratio = found["eager"]["seconds"] / found["examine"]["seconds"]
    lines += ["", f"Whole examine is **{ratio:.1f}×** faster than eager maps + dense singular values."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.tokens == TOKENS:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
