"""The compatibility page: one line per family, from the same cases that the tests run.

Run `python tests/capture/compatibility.py` to write `docs/compatibility.md` anew.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a script, this file finds its neighbours, but not the oracles beside them
    sys.path.insert(0, str(Path(__file__).parent.parent))

from families import FAMILIES, REFUSED, build, observed
from seen import Keep

from fullrank.capture import Anatomy, GradientState, Recorder, Stack, survey
from fullrank.errors import ModelError
from fullrank.verbs.batches import as_calls
from fullrank.verbs.gradients import forward_and_back

__all__ = ["PAGE", "line", "lines", "page"]

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
ROLES = ("q", "k", "v", "o", "up", "gate", "down")
TENSORS = ("q", "k", "v", "output")

HEAD = """# What is seen in which family

Every line is a small model of one family, built from its configuration with random weights. The tests run the same
models; they compare what is written here with what is seen, and check for each that the outputs stay the same bit for
bit, that every map times its values is what the model's own kernel returned, and that the stream is what plain hooks
see. To write this page anew: `python tests/capture/compatibility.py`.

- **stacks**: name and number of block calls of each.
- **attention**: the attention calls of a block, by part; in brackets how many of the blocks have them.
- **mid**: the stream between attention and MLP. Where there is none, the two are parallel, or the additions around them
  cannot be followed; `update_share` is then of whole blocks only.
- **read**: what a norm hands on, to attention (a), to the MLP (m). Post-norm models read the stream as it is.
- **roles**: which weights are known by what they do (q, k, v, o of attention; up, gate, down of the MLP).
- **gradients**: of the stream (s) and of queries, keys, values and outputs of every call (q k v o).

The same for a model of yours:

```python
from fullrank.capture import survey

anatomy = survey(model, lambda: model(**batch))
for stack in anatomy.stacks:
    print(stack.name, len(stack.paths), stack.calls[0], sorted({weight.role for weight in stack.weights[0]}))
```

{count} families; of {refused} of them no blocks are found.

| family | what is particular | stacks | attention | mid | read | roles | gradients | notes |
|---|---|---|---|---|---|---|---|---|
"""


def line(family: str) -> str:
    """The family's line of the table."""
    kind = (FAMILIES[family].__doc__ or "").strip().rstrip(".")
    if family in REFUSED:
        case = build(family)
        try:
            survey(case.model, case.run)
        except ModelError as error:
            return _row(family, kind, *["-"] * 6, str(error))
        raise AssertionError(f"{family} is not refused any more")
    seen = observed(family)
    stacks = seen.recorder.anatomy.stacks
    cells = (
        _each(stacks, lambda stack: str(len(stack.paths)), named=True),
        _each(stacks, _calls),
        _each(stacks, lambda stack: _mid(stack, seen.keep)),
        _each(stacks, lambda stack: _read(stack, seen.keep)),
        _each(stacks, _roles),
        gradients(family),
    )
    notes = [note for note in seen.recorder.notes if "no state between attention and MLP" not in note]
    return _row(family, kind, *cells, " ".join(notes) or "-")


def lines() -> dict[str, str]:
    """The lines that the committed page has now, by family."""
    found = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    return {row.split("|")[1].strip(): row for row in found if not row.startswith("| family")}


def page() -> str:
    """The whole page."""
    rows = [line(family) for family in sorted(FAMILIES)]
    return HEAD.replace("{count}", str(len(rows))).replace("{refused}", str(len(REFUSED))) + "\n".join(rows) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _each(stacks: Sequence[Stack], tell, *, named: bool = False) -> str:
    """One cell for all stacks; said once where they agree."""
    said = [tell(stack) for stack in stacks]
    if named:
        return ", ".join(f"{stack.name} {what}" for stack, what in zip(stacks, said, strict=True))
    if len(set(said)) == 1:
        return said[0]
    return "; ".join(f"{stack.name}: {what}" for stack, what in zip(stacks, said, strict=True))


def _calls(stack: Stack) -> str:
    kinds: dict[tuple[str, ...], int] = {}
    for parts in stack.calls:
        kinds[parts] = kinds.get(parts, 0) + 1
    if not any(kinds):
        return "none"
    told = {" ".join(parts): count for parts, count in kinds.items() if parts}
    if len(kinds) == 1:
        return next(iter(told))
    return ", ".join(f"{parts} ({count} of {len(stack.paths)})" for parts, count in told.items())


def _mid(stack: Stack, keep: Keep) -> str:
    found = len(keep.states("stream", "mid", stack.name))
    attending = sum(1 for parts in stack.calls if parts)
    if found == 0:
        return "no" if attending else "-"
    return "yes" if found >= attending else f"{found} of {attending}"


def _read(stack: Stack, keep: Keep) -> str:
    places = (("a", "out"), ("m", "mid"))
    return " ".join(letter for letter, part in places if keep.states("read", part, stack.name)) or "no"


def _roles(stack: Stack) -> str:
    """Roles that are known in every block that has them, and for the others why not."""
    weights = [weight for block in stack.weights for weight in block]
    reasons = {weight.role: weight.reason or "not found" for weight in weights if weight.reason or not weight.parameter}
    known = {weight.role for weight in weights} - set(reasons)
    said = " ".join(role for role in ROLES if role in known) or "none"
    for reason in dict.fromkeys(reasons.values()):
        said += f"; {' '.join(role for role in ROLES if reasons.get(role) == reason)}: {reason}"
    return said


@functools.cache
def _backward(family: str) -> tuple[list[GradientState], list[str]]:
    """One projection's backward through a family, and sentences about what it does not reach."""
    seen = observed(family)
    case, anatomy = seen.case, seen.recorder.anatomy
    keep = Keep(frozenset({"gradient"}))
    (call,) = as_calls(case.model, case.batch, None)
    with Recorder(case.model, [keep], anatomy=anatomy, real=call.real) as recorder:
        _, notes = forward_and_back(case.model, call, recorder, probes=1)
    return [event for event in keep.events if isinstance(event, GradientState)], notes


def gradients(family: str) -> str:
    """Which gradients arrive, and for the others why not."""
    events, notes = _backward(family)
    anatomy: Anatomy = observed(family).recorder.anatomy
    if not events:
        return " ".join(notes) or "none"
    return _each(anatomy.stacks, lambda stack: _arrived([event for event in events if event.stack == stack.name]))


def _arrived(events: Iterable[GradientState]) -> str:
    events = list(events)
    wanted = {"state", *TENSORS} & {event.which for event in events}
    missing = {event.which: event.reason for event in events if event.value is None}
    letters = {"state": "s"} | {name: name[0] for name in TENSORS}
    said = " ".join(letter for which, letter in letters.items() if which in wanted - set(missing)) or "none"
    for reason in dict.fromkeys(missing.values()):
        which = " ".join(letter for name, letter in letters.items() if missing.get(name) == reason)
        said += f"; {which}: {reason}"
    return said


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
