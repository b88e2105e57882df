"""What a user waits for: importing the package, the command's first words, and the whole demo.

Every figure is of a process of its own; sides that are compared take turns.

    python benchmarks/startup.py            # prints the table and writes it to benchmarks/startup.md
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import header

ROUNDS = 7
DEMOS = 3


def seconds(*command):
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def in_turns(rounds, **commands):
    """Median seconds of each command; one round that is not counted goes first, to fill the caches."""
    taken = {name: [] for name in commands}
    for counted in range(rounds + 1):
        for name, command in commands.items():
            spent = seconds(*command)
            if counted:
                taken[name].append(spent)
    return {name: statistics.median(values) for name, values in taken.items()}


def main():
    python = sys.executable
    found = in_turns(
        ROUNDS,
        torch=[python, "-c", "import torch"],
        fullrank=[python, "-c", "import torch, fullrank"],
        examine=[python, "-c", "import torch, fullrank; fullrank.examine"],
        help=[python, "-m", "fullrank", "--help"],
    )
    with tempfile.TemporaryDirectory() as folder:
        page = str(Path(folder) / "report.html")
        demo = in_turns(DEMOS, demo=[python, "-m", "fullrank", "demo", "--html", page])["demo"]
        size = Path(page).stat().st_size / 2**20
    added = found["fullrank"] - found["torch"]
    lines = [
        "# What a user waits for",
        "",
        header(),
        "",
        f"Medians of {ROUNDS} processes each ({DEMOS} for the demo), after one that is not counted.",
        "",
        "| process | seconds | |",
        "|---|---|---|",
        f"| `import torch` | {found['torch']:.2f} | |",
        f"| `import torch, fullrank` | {found['fullrank']:.2f} | adds {added:.2f} s (at most 0.3) |",
        f"| the same, and the name `fullrank.examine` | {found['examine']:.2f} | loads the rooms it composes |",
        f"| `fullrank --help` | {found['help']:.2f} | |",
        f"| `fullrank demo` | {demo:.1f} | under 20: six layers, 8 × 256 tokens, spectra, a page of {size:.1f} MiB |",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
