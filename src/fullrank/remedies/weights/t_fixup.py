"""T-Fixup: weights and embeddings shrunk with depth, so that norms and warm-up may go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fullrank.capture.anatomy import Stack
from fullrank.capture.weights import Weight
from fullrank.edit import Edit, find_norms, replace_module, replace_weight, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.remedies.weighing import scale_weights
from fullrank.remedies.weights.embeddings import tables

__all__ = ["t_fixup"]


@remedy(
    "t-fixup",
    "weights and embeddings shrunk with depth, so that norms and warm-up may go",
    addresses=("vanishing-or-exploding", "rank-collapse-depth", "dead-depth"),
    acts_on="weights",
    exactness="init-only",
    formula="decoder of N layers: W_V, W_O, W_up, W_down ← (9N)^−¼·W; encoder: ← 0.67·N^−¼·W; embeddings ← "
    "(9N)^−¼·E; norms=remove: N(X) ← X",
    papers=("T-Fixup, released code layer6ai-labs/T-Fixup",),
    keys=("residual_scaling",),
    parameters=(
        Parameter("norms", "the paper trains without norms", "keep", kind="choice", choices=("keep", "remove")),
        Parameter("embeddings", "whether embeddings are shrunk", True, kind="switch"),
    ),
    limits=(
        "For fresh weights of Xavier's size: on trained ones it removes most of what was learnt.",
        "The paper's rule is for pairs of encoder and decoder; for a stack alone the rule of its kind is ours, and "
        "so are gated MLPs, of which the gate stays as it is.",
        "Embeddings take the N of the stack that adds them up; those that encoder and decoder share, the decoder's. "
        "Patches and positions that are plain parameters stay.",
        "Norms in front of the first block, such as BERT's, stay; where norms are removed their parameters stay "
        "without a gradient.",
        "W_Q and W_K stay; without norms scores grow with the square of the stream.",
        "Read in code only; the paper's proofs were not verified.",
    ),
    cost="none; without norms less than before",
    only_weights={"norms": "keep"},
)
def t_fixup(patient: Patient, *, norms: str = "keep", embeddings: bool = True) -> Edit:
    """Shrink W_V, W_O, W_up, W_down and the embeddings; leave norms out."""
    stacks = {stack.name: stack for stack in patient.anatomy.stacks}
    notes: list[str] = []

    def factor(name: str, layer: int, weight: Weight) -> float:
        stack = stacks[name]
        N = len(stack.paths)
        return float((9 * N) ** -0.25 if _decodes(stack) else 0.67 * N**-0.25)

    def edits() -> Iterator[Edit]:
        yield scale_weights(patient, factor, "v", "o", "up", "down")
        found = tables(patient) if embeddings else ()
        for table in found:
            N = _depth([stacks[name] for name in table.stacks])
            yield replace_weight(patient.model, table.parameter, lambda W, N=N: W * (9 * N) ** -0.25)  # type: ignore[misc]
        bare = [name for name in stacks if not any(name in table.stacks for table in found)]
        if embeddings and bare:
            notes.append(f"No table of embeddings was seen in the first state of {' and '.join(bare)}: none is shrunk.")
        if norms == "remove":
            yield from _without_norms(patient)

    edit = together(edits())
    edit.notes = (*edit.notes, *notes)
    return edit


def _depth(readers: list[Stack]) -> int:
    """N of the stack that reads a table; of several the deepest decoder's."""
    return max(len(stack.paths) for stack in ([one for one in readers if _decodes(one)] or readers))


def _decodes(stack: Stack) -> bool:
    return stack.causal or any(part.startswith("cross") for calls in stack.calls for part in calls)


def _without_norms(patient: Patient) -> Iterator[Edit]:
    model = patient.model
    found = find_norms(model, patient.forward, patient.anatomy, patient.branches)
    if not found.found:
        reason = " ".join(found.notes) or "none was found in its blocks"
        raise RemedyError(f"there are no norms to remove from this {type(model).__name__}: {reason}")
    for norm in found:
        if not norm.path:
            raise RemedyError(
                f"the norm of {norm.stack} layer {norm.layer} is written out in the block and cannot be removed; use "
                "norms=keep."
            )
    for path in dict.fromkeys(norm.path for norm in found):
        yield replace_module(model, path, _as_given)


def _as_given(run: Callable[..., Any], X: Any, *args: Any, **kwargs: Any) -> Any:
    """The state in place of its norm."""
    return X
