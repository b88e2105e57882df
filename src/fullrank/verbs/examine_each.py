"""examine_each: what happens inside each of several variants of a model, as one report."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.errors import BatchError, FullrankError, TableError
from fullrank.report import Report, Variants
from fullrank.spec import Inputs, Subject, inputs
from fullrank.verbs.asked import checked_contexts, longest_context
from fullrank.verbs.examine import Progress, examine
from fullrank.verbs.labels import told_apart
from fullrank.verbs.load_repaired import loaded

__all__ = ["Candidate", "examine_each"]

Candidate = nn.Module | str | Subject | Callable[[], nn.Module | str | Subject]
"""A module, a SPEC, what `spec.load` gave, or a function that makes one of these when its turn has come."""


def examine_each(
    models: Sequence[Candidate],
    batch: Any = None,
    *,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Variants:
    """Examine several variants of a model one after the other: checkpoints of a run, revisions, sizes.

    What is given by SPEC or by a function is loaded when its turn has come and let go of before the next one, so that
    one model at a time is in memory. A variant that fails does not lose the others: its reason is kept in `failed`. By
    default all read the same documents; where their tokenizers make different tokens of them, `notes` says so.

    Args:
        models: modules, SPECs, loaded subjects, or functions that make one of these.
        batch: as for `examine`, the same for all; or a function that makes the batch of a loaded subject.
        labels: one name for each; by default what tells them apart.
        seed: as for `examine`.
        progress: called with a few words and the share of all that is done.
        **options: every other option of `examine`.

    Returns:
        The variants, in the order given.

    Raises:
        TableError: where there are no models, or labels that are not one different name each.
        FullrankError: where no variant could be examined; the reason of the first.
    """
    if isinstance(models, str | nn.Module) or not models:
        raise TableError("models must be a list of models or SPECs, at least one.")
    names = _labels(models, labels)
    if isinstance(batch, Iterable) and not isinstance(batch, Mapping | tuple | Tensor | str | Inputs):
        batch = list(batch)  # an iterator would be empty after the first model
    tell = progress or (lambda what, share: None)
    reports: dict[str, Report] = {}
    failed: list[tuple[str, str]] = []
    read: dict[str, str] = {}
    refusals: list[Exception] = []
    for index, (candidate, label) in enumerate(zip(models, names, strict=True)):

        def step(what: str, share: float, index: int = index, label: str = label) -> None:
            tell(f"{label}: {what}", (index + share) / len(models))

        tell(f"{label}: loading", index / len(models))
        try:
            reports[label], read[label] = _one(candidate, batch, seed=seed, progress=step, **options)
        except Exception as error:  # noqa: BLE001 - hours of other variants must not be lost to one
            refusals.append(_alone(error))
            failed.append((label, _reason(error)))
        _let_go()
    if not reports:
        raise refusals[0]
    return Variants.of(list(reports.values()), list(reports), failed=failed, notes=_differing(read))


def _one(candidate: Candidate, batch: Any, *, seed: int, progress: Progress, **options: Any) -> tuple[Report, str]:
    """The report and what tells whether two models read the same; what was loaded here is gone afterwards."""
    made = candidate() if callable(candidate) and not isinstance(candidate, nn.Module) else candidate
    if isinstance(made, str):
        made = loaded(made, seed=seed, memory=options.pop("memory", None))
    given = batch
    if callable(batch) and not isinstance(batch, Mapping):
        if not isinstance(made, Subject):
            raise BatchError(f"batch is a function, which takes a loaded Subject; {type(made).__name__} is none.")
        given = batch(made)
    elif batch is None and isinstance(made, Subject):
        longest = longest_context(checked_contexts(options.get("contexts")), made)
        given = inputs(made, context=longest, seed=seed)
    return examine(made, given, seed=seed, progress=progress, **options), _fingerprint(given)


def _labels(models: Sequence[Candidate], labels: Sequence[str] | None) -> list[str]:
    if labels is None:
        return told_apart([_name(model, index) for index, model in enumerate(models, start=1)])
    named = [str(label) for label in labels]
    if len(named) != len(models) or len(set(named)) != len(named) or not all(named):
        raise TableError(f"labels={named} must be {len(models)} different names, one per model.")
    return named


def _name(model: Candidate, index: int) -> str:
    if isinstance(model, str):
        return model
    if isinstance(model, Subject):
        return model.name
    return type(model).__name__ if isinstance(model, nn.Module) else f"variant {index}"


def _alone(error: Exception) -> Exception:
    """The error without the frames that it went through: they hold the model."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, FullrankError) else f"{type(error).__name__}: {words or 'no message'}"[:500]


def _let_go() -> None:
    gc.collect()  # modules and their hooks are cycles: without this two models would be in memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fingerprint(given: Any) -> str:
    """Of token ids: equal where two models read the same tokens; empty where no ids are known."""
    if not isinstance(given, Inputs):
        return ""
    digest = hashlib.sha256()
    for one in given.batches:
        ids = one.get("input_ids") if isinstance(one, Mapping) else None
        if not isinstance(ids, Tensor):
            return ""
        digest.update(repr(tuple(ids.shape)).encode() + ids.cpu().numpy().tobytes())
    return digest.hexdigest()


def _differing(read: Mapping[str, str]) -> list[str]:
    labels = list(read)
    others = [label for label in labels[1:] if read[label] != read[labels[0]]]
    if not others:
        return []
    return [
        f"other tokens than those of {labels[0]} are read by {', '.join(others)}: the documents are the same, but "
        "tokenizer, vocabulary or context are not, so that numbers of tokens are not of the same tokens."
    ]
