"""The options of `examine`, in the groups in which they are handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fullrank.errors import BatchError, ContextError
from fullrank.measure.budget import Budget
from fullrank.spec import Inputs, Subject, inputs
from fullrank.verbs.asked import checked_contexts, checked_probes, chosen_heads, held_against, longest_context

__all__ = ["Feeding", "Loading", "Looking"]


@dataclass(frozen=True)
class Loading:
    """The options of `spec.load`, by its names."""

    init: bool = False
    revision: str | None = None
    device: str = "auto"
    dtype: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    memory: str | None = None


@dataclass(frozen=True)
class Feeding:
    """The options of `spec.inputs`, by its names."""

    context: int | None = None
    documents: int | None = None
    text: Path | None = None
    data: Path | None = None
    images: Sequence[str] | None = None

    def inputs(self, subject: Subject, looking: Looking, *, seed: int) -> Inputs:
        """What a subject is fed; as long as the longest context, where several are asked for."""
        feeding = self
        if looking.lengths and self.context is None:
            feeding = replace(self, context=longest_context(looking.lengths, subject))
        return inputs(subject, seed=seed, **asdict(feeding))


@dataclass(frozen=True)
class Looking:
    """What is measured, as the command line says it.

    Attributes:
        spectrum: whether to take singular values.
        heads: heads to take them of, separated by commas; all by default.
        contexts: lengths to take every number at, separated by commas.
        gradients: whether to go back through the model.
        probes: number of random projections, where it has no loss; None for the default.
        weights: whether to measure the weights.
        batch_statistics: whether batch norms use those of the batch.
        blocks: path of the list of blocks, where they are not found by themselves.
        seconds: a time budget.
        reference: whether to measure the same architecture at its own initialisation too.
        verify: whether to test suspicions by intervention.
        target_dtypes: whose range the numbers must fit too.
        epsilon: of the optimiser.
    """

    spectrum: bool = True
    heads: str | None = None
    contexts: str | None = None
    gradients: bool = False
    probes: int | None = None
    weights: bool = False
    batch_statistics: bool = False
    blocks: str | None = None
    seconds: float | None = None
    reference: bool = True
    verify: bool = False
    target_dtypes: Sequence[str] = ()
    epsilon: float | None = None

    def __post_init__(self) -> None:
        # refused as `examine` would refuse it, before a checkpoint is loaded
        if self.probes is not None and not self.gradients:
            raise BatchError(f"--probes {self.probes} is of --gradients, which were not asked for.")
        if self.probes is not None:
            checked_probes(self.probes)
        if self.seconds is not None:
            Budget(self.seconds)
        held_against(self.target_dtypes, self.epsilon)
        chosen_heads(self.named, spectrum=self.spectrum)
        _ = self.lengths

    @property
    def named(self) -> list[str] | None:
        """The heads by name; None for all."""
        return None if self.heads is None else self.heads.split(",")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The contexts as numbers.

        Raises:
            ContextError: for what are no lengths.
        """
        if self.contexts is None:
            return ()
        parts = [part.strip() for part in self.contexts.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ContextError(
                f"--contexts {self.contexts!r} are no lengths; write them with commas, as in 256,1024,4096."
            )
        return checked_contexts([int(part) for part in parts])

    @property
    def arguments(self) -> dict[str, Any]:
        """By the names of `examine`."""
        plain = (
            "spectrum",
            "gradients",
            "weights",
            "batch_statistics",
            "blocks",
            "seconds",
            "reference",
            "verify",
            "epsilon",
        )
        return {name: getattr(self, name) for name in plain} | {
            "heads": self.named,
            "contexts": self.lengths or None,
            "target_dtypes": tuple(self.target_dtypes),
            **({} if self.probes is None else {"probes": self.probes}),
        }
