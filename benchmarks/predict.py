"""What a prediction costs: one architecture, a map of ten thousand, and the memory of both over depth.

Time is of a warm process of its own that has never loaded transformers; memory is the peak of what Python and numpy
allocate, in another process.

    python benchmarks/predict.py            # prints the table and writes it to benchmarks/predict.md
"""

import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

from timing import header

ROUNDS = 7


def planned(depth, mask):
    from fullrank import Architecture

    return Architecture(depth=depth, width=1024, heads=16, context=2048, mask=mask, correlation=0.1)


def one(depth, mask):
    import fullrank

    return fullrank.predict(planned(depth, mask))


def plane(depth, mask):
    import numpy as np

    import fullrank

    vary = {"residual_scale": np.geomspace(0.1, 10, 100), "qk_std": np.geomspace(0.001, 0.5, 100)}
    return fullrank.trainability(planned(depth, mask), vary=vary)


SIDES = {"predict": one, "map": plane}


def seconds(what, depth, mask):
    """Median of seven, after one that is not counted; refuses to report where transformers was loaded."""
    SIDES[what](depth, mask)
    taken = []
    for _ in range(ROUNDS if what == "predict" else 3):
        start = time.perf_counter()
        SIDES[what](depth, mask)
        taken.append(time.perf_counter() - start)
    assert "transformers" not in sys.modules
    return statistics.median(taken)


def peak_mib(what, depth, mask):
    SIDES[what](4, mask)  # caches, which depth does not fill
    tracemalloc.start()
    kept = SIDES[what](depth, mask)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    del kept
    return peak


def apart(measure, *arguments):
    """A measurement in a process of its own."""
    code = f"import predict, json; print(json.dumps(predict.{measure}{arguments!r}))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=here)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    lines = [
        "# What a prediction costs",
        "",
        header(),
        "",
        "All theories, their rows and the answers of one architecture; a map of 100 × 100 residual scales and",
        "standard deviations of W_Q and W_K. Warm, medians; transformers is not loaded. Memory is the peak of a",
        "call, its result included.",
        "",
        "| what | blocks | attention | seconds | limit | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    limits = {("predict", 12): "0.05", ("map", 48): "2"}
    for what, depths in (("predict", (12, 48, 192)), ("map", (12, 48, 192))):
        for depth in depths:
            for mask in ("full", "causal"):
                spent, peak = apart("seconds", what, depth, mask), apart("peak_mib", what, depth, mask)
                shown = f"{spent:.3f}" if what == "predict" else f"{spent:.2f}"
                limit = limits.get((what, depth), "")
                lines.append(f"| {what} | {depth} | {mask} | {shown} | {limit} | {peak:.1f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
