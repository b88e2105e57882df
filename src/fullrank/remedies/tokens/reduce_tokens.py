"""Fewer tokens in a vision transformer: keep high frequencies and pool the rest, merge what is alike, or prune."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from fullrank.edit import Edit, rewrite_residual, together
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy
from fullrank.remedies.tokens.patch_grid import grid_of
from fullrank.remedies.tokens.token_macs import counted_macs
from fullrank.remedies.tokens.token_places import Attending, Plan, Reduce, Restore
from fullrank.remedies.tokens.token_schedule import Method, Reducing, equal_cost, quarters, token_course
from fullrank.remedies.tokens.vision import Vision, vision_of

__all__ = ["reduce_tokens"]

_NAME = "reduce-tokens"
_Value = TypeVar("_Value")


def _short(number: float) -> str:
    unit, letter = next((one for one in ((1e9, "G"), (1e6, "M")) if number >= one[0]), (1e3, "k"))
    return f"{number / unit:.3g} {letter}"


@remedy(
    _NAME,
    "fewer tokens for later blocks of a vision transformer: pooled, merged or pruned",
    addresses=("rank-collapse-depth",),
    acts_on="tokens",
    exactness="changes-function",
    formula=(
        "between attention and MLP; frequency: keep ⌊keep·n⌋ patches of largest Σ_h,q (A − J)_qk and w² means of the "
        "rest by windows, then A ← A_LP + (1 + ω₁)A_HP + (1 + ω₂)A_DC, ω = 0 at first, with LP = J and HP = A − J over "
        "patches and DC = A over the means; merge: the r even tokens whose keys are most alike with one of the odd go "
        "into it, by size-weighted means; prune: keep ⌈keep·n⌉ that the class token attends to most, and Σ a_i x_i of "
        "the rest; log size is added to the logits of keys that stand for several tokens"
    ),
    papers=(
        "Lee, Hur, Choi, Yu, Kim: Frequency-Aware Token Reduction for Efficient Vision Transformer, NeurIPS 2025, "
        "arXiv 2511.21477",
        "Bolya et al.: Token Merging (ToMe)",
        "Liang et al.: EViT",
    ),
    keys=("frequency_tokens",),
    parameters=(
        Parameter("method", "which tokens go", "frequency", kind="choice", choices=("frequency", "merge", "prune")),
        Parameter(
            "layers",
            "blocks that reduce; none: after each quarter of the depth (4, 7, 10 of 12), for merge every block",
            None,
            kind="layers",
            optional=True,
        ),
        Parameter(
            "keep",
            "share of patches that stays, of frequency and prune, at the first block that reduces, at the second …; "
            "the last for all that follow",
            (0.7,),
            kind="numbers",
            above=0.0,
            high=1.0,
        ),
        Parameter(
            "windows",
            "w of frequency, at the first block that reduces, at the second …; the last for all that follow",
            (2, 1),
            kind="sizes",
        ),
        Parameter(
            "r",
            "tokens that merge merges at the first block, at the second …; the last for all that follow; none: so many "
            "in each that it costs no more than frequency at the same keep and windows",
            None,
            kind="sizes",
            optional=True,
        ),
        Parameter(
            "update",
            "how frequency takes earlier pooled tokens into new ones: as the tokens that they stand for, or as one",
            "sized",
            kind="choice",
            choices=("sized", "plain"),
        ),
        Parameter(
            "reweigh", "whether frequency has ω₁ and ω₂ in blocks after the first reduction", True, kind="switch"
        ),
        Parameter(
            "fusion",
            "what prune makes of the others: their sum weighed by attention, its weights adding to 1, nothing",
            "raw",
            kind="choice",
            choices=("raw", "normalised", "none"),
        ),
        Parameter(
            "compensate",
            "whether log size is added to logits; none: for frequency and merge",
            None,
            kind="switch",
            optional=True,
        ),
        Parameter(
            "protected",
            "tokens that come first and stay, the class token before all; none: those that are the same for all images",
            None,
            kind="integer",
            low=0,
            optional=True,
        ),
        Parameter(
            "restore",
            "whether after the last block every token is there again, with the state of what stands for it, so that "
            "means over tokens weigh by size; none: where there is no class token",
            None,
            kind="switch",
            optional=True,
        ),
    ),
    limits=(
        "Saves computation: frequency is said to do so without hastening rank collapse, and undoes none.",
        "Costs accuracy until the model is tuned with it; no accuracy of frequency without training is published.",
        "For one stack of plain blocks over images; windows, rotary or relative positions, masks and text are refused.",
        "Where there is a class token the final states are fewer, and a head that averages them weighs each alike: set "
        "restore for such a head.",
        "The paper's repository was not available: its update of pooled tokens and A_DC are readings of the text.",
        "Tokens are chosen by the order of scores: in half precision others may be chosen where scores are close.",
        "With compensate=false a window of which nothing was dropped leaves a token, the mean of all patches, that is "
        "attended to as others are.",
        "Windows are those of the grid that the convolution of patches makes in each forward. Where there is none, "
        "patches are taken for squares, and images of another form than at the repair are refused.",
        "Under activation checkpointing a second forward before the backward pass of the first is not supported.",
        "Venues and numbers of the papers on merging and pruning were not verified.",
    ),
    cost="saves multiply-accumulates, which the repair reports; log sizes are a bias on the scores, which flash "
    "kernels of the Hugging Face dispatch do not take (compensate=false); two parameters a head and block for ω",
    structural=True,
)
def reduce_tokens(
    patient: Patient,
    *,
    method: Method = "frequency",
    layers: tuple[int, ...] | None = None,
    keep: tuple[float, ...] = (0.7,),
    windows: tuple[int, ...] = (2, 1),
    r: tuple[int, ...] | None = None,
    update: str = "sized",
    reweigh: bool = True,
    fusion: str = "raw",
    compensate: bool | None = None,
    protected: int | None = None,
    restore: bool | None = None,
) -> Edit:
    """Reduce tokens between attention and MLP."""
    vision = vision_of(patient, protected)
    if method == "prune" and vision.protected == 0:
        raise RemedyError(
            "method='prune' needs a class token, and no token of this model is the same for all images: use "
            "'frequency' or 'merge', or say protected=1 where the first token is one."
        )
    if method == "merge" and any(site.first.width is None for site in vision.sites):
        raise RemedyError(
            "method='merge' needs keys, and this model softmaxes by itself and shows its scores alone: use "
            "'frequency' or 'prune', or its fused attention."
        )
    steps = _steps(vision, method, layers, keep, windows, r, fusion)
    wide = max(round(step.pooled**0.5) for step in steps.values()) if method == "frequency" else 1
    patches = vision.tokens - vision.protected
    grid, noting = grid_of(patient, vision.stack, patches) if wide > 1 else (None, None)
    if grid is not None and min(grid.rows, grid.columns) < wide:
        raise RemedyError(
            f"windows={wide} needs a grid at least as wide, and there are {grid.rows} × {grid.columns} patches."
        )
    plan = Plan(
        dict(sorted(steps.items())),
        vision.protected,
        grid,
        update == "sized",
        fusion,
        method != "prune" if compensate is None else compensate,
    )
    course = token_course(vision.tokens, steps, depth=vision.depth, protected=vision.protected)
    for layer in steps:
        if course[layer - 1][0] == course[layer - 1][1]:
            raise RemedyError(
                f"block {layer} would have no fewer than its {course[layer - 1][0]} tokens after it: "
                "keep fewer, in fewer windows, or leave the block out of layers=."
            )
    before = counted_macs(patient.model, patient.forward)
    back = vision.protected == 0 if restore is None else restore
    edit = _put(patient, vision, plan, noting, omega=reweigh and method == "frequency", back=back)
    try:
        after = counted_macs(patient.model, patient.forward)
    except Exception as reason:  # noqa: BLE001  # whatever the model raises when it meets fewer tokens
        edit.undo()
        told = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        raise RemedyError(f"{type(patient.model).__name__} does not go on with fewer tokens: {told}") from None
    counts = " → ".join(dict.fromkeys(map(str, [vision.tokens, *(left for _, left in course)])))
    edit.notes = (
        f"{_short(after / vision.images)} of {_short(before / vision.images)} multiply-accumulates an image "
        f"({after / before:.0%}), those for choosing tokens included; tokens {counts}.",
    )
    return edit


def _steps(
    vision: Vision,
    method: Method,
    layers: tuple[int, ...] | None,
    keep: tuple[float, ...],
    windows: tuple[int, ...],
    r: tuple[int, ...] | None,
    fusion: str,
) -> dict[int, Reducing]:
    wrong = [layer for layer in layers or () if layer > vision.depth]
    if wrong:
        raise RemedyError(f"layers= names block {wrong[0]}, and there are {vision.depth}.")
    chosen = tuple(sorted(set(layers or quarters(vision.depth))))
    if method != "merge" or r is None:
        _check_number("keep", keep, chosen)
    shares, wide = _by_block(keep, chosen), _by_block(windows, chosen)
    if method == "prune":
        return {layer: Reducing("prune", share, int(fusion != "none")) for layer, share in shares.items()}
    widths = list(wide.values())
    if (method == "frequency" or r is None) and any(one < other for one, other in pairwise(widths)):
        raise RemedyError(f"windows={widths} must not grow: pooled tokens are not taken apart again.")
    frequency = {layer: Reducing("frequency", shares[layer], wide[layer] ** 2) for layer in chosen}
    if method == "frequency":
        return frequency
    merging = tuple(sorted(set(layers or range(1, vision.depth + 1))))
    if r is None:
        number = equal_cost(
            vision.tokens,
            frequency,
            merging,
            depth=vision.depth,
            width=vision.width,
            mlp_ratio=vision.mlp_ratio,
            protected=vision.protected,
        )
        return {layer: Reducing("merge", merged=number) for layer in merging}
    _check_number("r", r, merging)
    return {layer: Reducing("merge", merged=one) for layer, one in _by_block(r, merging).items()}


def _by_block(values: Sequence[_Value], layers: Sequence[int]) -> dict[int, _Value]:
    """The first value at the first block, the second at the second …; the last at all that follow."""
    return {layer: values[min(index, len(values) - 1)] for index, layer in enumerate(layers)}


def _check_number(name: str, values: Sequence[object], layers: Sequence[int]) -> None:
    if len(values) > len(layers):
        raise RemedyError(f"{name}= has {len(values)} numbers, and tokens go in {len(layers)} blocks.")


def _put(
    patient: Patient, vision: Vision, plan: Plan, noting: Callable[[], Edit] | None, *, omega: bool, back: bool
) -> Edit:
    first, last = min(plan.steps), max(plan.steps)
    branches = patient.branches  # looked for while nothing is changed

    def attending(site: Site) -> Attending | None:
        later = any(layer > first for layer in site.layers)
        if not later and not any(layer in plan.steps for layer in site.layers):
            return None
        return Attending(plan, site.first.key_value_heads if omega and later else None)

    def edits() -> Iterator[Edit]:
        where = {"stack": vision.stack, "branch": "attention"}
        yield patient.rewrite(_NAME, before=attending, sites=vision.sites)
        if noting is not None:
            yield noting()
        for layer in sorted(plan.steps):
            yield rewrite_residual(patient.model, patient.anatomy, branches, Reduce(plan, layer), layer=layer, **where)
        if back:
            if plan.fusion == "none" and plan.steps[last].method == "prune":
                raise RemedyError("restore=true needs what stands for pruned tokens, and fusion='none' leaves nothing.")
            names = [one.name for one in branches if (one.stack, one.layer) == (vision.stack, vision.depth)]
            if len(names) < 2:
                raise EditError("the last block adds nothing after its attention, so tokens cannot be restored there.")
            where |= {"branch": names[-1]}
            yield rewrite_residual(patient.model, patient.anatomy, branches, Restore(plan), layer=vision.depth, **where)

    return together(edits())
