"""What people recommend before anybody changes an architecture, as trials beside the remedies.

Each is a change of how a model is trained, or of its embedding's scale, with the place where it is recommended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fullrank.capture.anatomy import Anatomy
from fullrank.edit import replace_weight, together
from fullrank.errors import TrialError
from fullrank.trials.course import Settings

__all__ = ["RECOMMENDATIONS", "Recommendation", "recommendations"]

_RELATIVE = ("learning_rate",)


@dataclass(frozen=True)
class Recommendation:
    """One change of the training.

    Attributes:
        name: as `screen` lists it.
        sentence: what it changes and what it is said to be good for.
        formula: what is computed.
        source: where it is recommended.
        settings: fields of `Settings` that it sets; `learning_rate` is a factor on the one it stands beside.
        embedding: a factor on the embedding's weights; None to leave them. `√d` and `1/√d` are of its width.
        fixed_rate: whether it says something of the rate itself, so that it is not tried at its own best one.
    """

    name: str
    sentence: str
    formula: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    embedding: str | None = None
    fixed_rate: bool = False

    def applied_to(self, settings: Settings) -> Settings:
        """The settings with its own in their place."""
        changes = {
            name: getattr(settings, name) * value if name in _RELATIVE else value
            for name, value in self.settings.items()
        }
        return replace(settings, **changes)

    def edit(self, model: nn.Module, anatomy: Anatomy | None = None) -> AbstractContextManager[Any]:
        """What it changes of the model itself, undone on leaving; nothing for those that are settings alone.

        Args:
            model: whose embedding may be scaled.
            anatomy: where `capture.survey` saw it.

        Returns:
            A context manager.

        Raises:
            TrialError: where the embedding is to be scaled and none was seen.
        """
        if self.embedding is None:
            return nullcontext()
        stacks = anatomy.stacks if anatomy is not None else ()
        found = sorted({stack.embed.parameter for stack in stacks if stack.embed is not None} - {""})
        if not found:
            raise TrialError("no embedding was seen that leads to the first block, so that none can be scaled.")
        outputs = {model.get_parameter(s.unembed.parameter) for s in stacks if s.unembed and s.unembed.parameter}
        tied = [name for name in found if model.get_parameter(name) in outputs]
        if tied:
            raise TrialError(f"{tied[0]} is the output's weight too, so that scaling it would scale the logits.")
        edits = []
        for name in found:
            weight = model.get_parameter(name).detach()
            factor = weight.shape[-1] ** (0.5 if self.embedding == "√d" else -0.5)
            edits.append(replace_weight(model, name, factor * weight))
        return together(edits)


RECOMMENDATIONS: tuple[Recommendation, ...] = (
    Recommendation(
        "learning-rate/3",
        "A third of the best learning rate, against loss spikes and divergence.",
        "η → η / 3",
        "Wortsman et al. 2023, arXiv 2309.14322",
        {"learning_rate": 1 / 3},
        fixed_rate=True,
    ),
    Recommendation(
        "learning-rate×3",
        "Three times the best learning rate, where training is slow.",
        "η → 3 η",
        "Wortsman et al. 2023, arXiv 2309.14322",
        {"learning_rate": 3.0},
        fixed_rate=True,
    ),
    Recommendation(
        "warm-up",
        "The learning rate rises over the first tenth of the steps; post-norm models need it.",
        "η_t = η · min(1, t / (T/10))",
        "Xiong et al. 2020, arXiv 2002.04745",
        {"warm_up": 0.1},
    ),
    Recommendation(
        "adam-eps",
        "A larger ε keeps Adam from taking full steps where gradients are tiny.",
        "ε = 1e-6: Δ = −η m̂ / (√v̂ + ε)",
        "Liu et al. 2019, arXiv 1907.11692",
        {"eps": 1e-6},
    ),
    Recommendation(
        "adam-beta2",
        "A shorter memory of squared gradients follows them when they change quickly.",
        "β₂ = 0.95: v ← β₂ v + (1 − β₂) g²",
        "Brown et al. 2020, arXiv 2005.14165",
        {"betas": (0.9, 0.95)},
    ),
    Recommendation(
        "z-loss",
        "A penalty keeps the log of the output's normaliser near 0, against drifting logits.",
        "L + 1e-4 · (log Σ exp z)²",
        "Chowdhery et al. 2022, arXiv 2204.02311",
        {"z_loss": 1e-4},
    ),
    Recommendation(
        "embedding×√d",
        "Embeddings scaled up by the root of the width, so that they are not small beside what blocks add.",
        "E → √d · E",
        "Takase et al. 2023, arXiv 2312.16903",
        embedding="√d",
    ),
    Recommendation(
        "embedding/√d",
        "Embeddings scaled down by the root of the width, where they drown what blocks add.",
        "E → E / √d",
        "Vaswani et al. 2017, arXiv 1706.03762, with E of unit variance",
        embedding="1/√d",
    ),
)


def recommendations(names: Sequence[str] | None = None) -> tuple[Recommendation, ...]:
    """Recommendations by name.

    Args:
        names: some of them; None for all.

    Returns:
        In the order asked for.

    Raises:
        TrialError: for a name that is none of them.
    """
    if names is None:
        return RECOMMENDATIONS
    known = {one.name: one for one in RECOMMENDATIONS}
    for name in names:
        if name not in known:
            raise TrialError(f"there is no recommendation {name!r}; there are {', '.join(known)}.")
    return tuple(known[name] for name in names)
