"""What verdicts say of healthy models, with every threshold at its value and twice as sensitive.

Every family of the compatibility table at its default initialisation, the pretrained encoder, and the clean models of
the planted study (which are trained first) are examined with gradients, weights and interventions; then every failure
is looked for again in the same numbers with one threshold moved by a factor of two.

    python benchmarks/specificity.py                # writes benchmarks/specificity.md
    python benchmarks/specificity.py --cache DIR    # keeps trained models there
    python benchmarks/specificity.py --only gpt2    # models with that in their kind or name; writes nothing

Then `python tests/diagnosis/verdicts_page.py` copies the counts to the page on verdicts.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from timing import header

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "capture")]


def quiet():
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def examine(one, cache):
    """What is said of a model, or what examine stumbled over."""
    from healthy.examining import Outcome, examined

    try:
        return examined(one, cache)
    except Exception as error:  # noqa: BLE001 - one model must not take the others with it
        return Outcome(one.kind, one.name, refused=f"FAILED: {type(error).__name__}: {error}".splitlines()[0])


def train(model, cache):
    from planted.trained import trained

    trained(*model, cache=cache)


def outcomes(models, cache, workers):
    """What is said of every model, in the order of the models."""
    found, started = {}, time.perf_counter()
    learned = dict.fromkeys((one.case.architecture, one.case.seed) for one in models if one.kind == "trained")
    with ProcessPoolExecutor(workers, get_context("spawn"), quiet) as pool:
        list(pool.map(partial(train, cache=cache), learned))
        running = {pool.submit(partial(examine, one, cache)): one for one in models}
        for run in as_completed(running):
            one = running[run]
            found[one] = outcome = run.result()
            said = ", ".join(f"{severity} {name}" for severity, name, _ in outcome.said) or outcome.refused or "nothing"
            seconds = time.perf_counter() - started
            print(f"{seconds:5.0f} s  {len(found)}/{len(models)}  {one.kind} {one.name}: {said}", flush=True)
    return [found[one] for one in models]


def text(found, workers):
    from fullrank.diagnosis import THRESHOLDS
    from healthy.models import KINDS
    from healthy.table import alarms, alarms_table, families_table, spoken_of

    seen = [one for one in found if not one.refused]
    failed = [one for one in seen if any(severity == "fail" for severity, _, _ in one.said)]
    warned = [one for one in seen if any(severity != "note" for severity, _, _ in one.said)]
    most = max((sum(severity != "note" for severity, _, _ in one.said) for one in seen), default=0)
    lines = [
        "# Healthy models",
        "",
        header(workers=workers),
        "",
        "Models with nothing wrong, examined with `gradients=True, weights=True, verify=True` (`tests/healthy/`). A",
        "verdict that warns of one is a false alarm.",
        "",
        *families_table(found, KINDS),
        "",
        f"{len(seen)} examinations: {len(failed)} with a failure, {len(warned)} with a warning or more, no more than "
        f"{most} each.",
        "",
        *spoken_of(found),
        "",
        "## Every limit",
        "",
        "*Held against*: in how many of the examinations a failure that was looked for read the limit. Of those, how",
        "many have a note, a warning, a failure as the gravest of what the failures that read it say; then the same",
        "with this limit alone moved by a factor of two (of what it leaves to 1, where it is a share above one half)",
        "and suspicions tested anew: to the side with the graver alarms, or to both where they are the same. Of the",
        "limits by which weights are judged, a warning is trained weights called fresh or fresh ones called trained;",
        "of those by which the reference is drawn, one that is drawn another way.",
        "",
        "Where a limit is between a warning and a failure (`…grave`, `…blocks`, `…share`), or what it is for was never",
        "suspected, it is read by none: nothing is known of its own alarms but that there were none to grade.",
        "",
        *alarms_table({name: alarms(one, seen) for name, one in THRESHOLDS.items()}),
        "",
        f"One examination took {sum(one.seconds for one in seen) / max(1, len(seen)):.1f} s on average.",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    quiet()

    from healthy.models import healthy

    models = [one for one in healthy() if any(part in f"{one.kind} {one.name}" for part in options.only)]
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        written = text(outcomes(models, cache, options.workers), options.workers)
    print(written)
    if options.only == [""]:
        Path(__file__).with_suffix(".md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
