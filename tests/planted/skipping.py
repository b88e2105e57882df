"""How well a block's cheap numbers foretell what the loss loses without it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import fullrank
from fullrank.capture import undisturbed
from fullrank.diagnosis.effects import Trials
from fullrank.diagnosis.intervention import Intervention
from fullrank.verbs.batches import as_calls
from fullrank.verbs.passes import anatomy_of
from fullrank.verbs.ranks import Ranks
from planted.trained import Batch


@dataclass(frozen=True)
class Block:
    """One block of a trained model.

    Attributes:
        model: of which.
        layer: from 1.
        update_share: ‖Y − X‖ / ‖X‖ of the stream before and after it.
        turn: sine of the angle between the stream before and after it.
        change: loss without it minus loss with it, in nats.
    """

    model: str
    layer: int
    update_share: float
    turn: float
    change: float

    @property
    def proxy(self) -> float:
        """By how much it changes the stream's size or direction, whichever is less."""
        return min(self.update_share, self.turn)


def blocks_of(name: str, model: Any, batch: Batch) -> list[Block]:
    """Every block of a model: its numbers in the report, and the loss without it."""
    rows = fullrank.examine(model, batch, spectrum=False, reference=False).rows
    calls = as_calls(model, batch)
    with undisturbed(model):
        anatomy = anatomy_of(model, calls, Ranks())
    (stack,) = anatomy.stacks
    trials = Trials(model, anatomy, calls)
    found = []
    for layer in range(1, len(stack.paths) + 1):
        here = [row for row in rows if (row.layer, row.site, row.scope) == (layer, "stream", "all")]
        of = {row.metric: row.value for row in here}
        effect = trials.effect(Intervention("skip-block", stack.name, layer))
        assert not isinstance(effect, str) and effect.outcome == "loss"
        cosine = of["neighbour_cosine"] or 0.0
        turn = math.sqrt(max(0.0, 1 - cosine**2)) if cosine > 0 else 1.0
        found.append(Block(name, layer, of["update_share"] or 0.0, turn, effect.change))
    return found
