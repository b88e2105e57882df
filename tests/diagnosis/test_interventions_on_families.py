"""Every intervention on every family that the survey reads: an effect or a reason, and no trace."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES
from family import REFUSED

from fullrank.capture import survey
from fullrank.diagnosis.effects import Trials
from fullrank.diagnosis.intervention import Intervention
from fullrank.report.verdict import Effect
from fullrank.verbs.batches import as_calls
from untouched import changes, everything

OF_ATTENTION = ("zero-head", "mean-head", "mask-sink", "deflate-attention")


def interventions(stack) -> list[Intervention]:
    layer = len(stack.paths)
    made = [Intervention("skip-block", stack.name, layer), Intervention("stream-means", stack.name, layer - 1)]
    parts = stack.calls[layer - 1] if stack.calls else ()
    made += [Intervention("merge-heads", stack.name, layer, part=part, groups=((0, 1),)) for part in parts]
    return made + [Intervention(kind, stack.name, layer, part=part) for part in parts for kind in OF_ATTENTION]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - REFUSED.keys()))
def test_a_family_answers_with_effects_or_reasons_and_is_left_as_it_was(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = FAMILIES[name]()
    case.model.eval()
    anatomy = survey(case.model, case.run)
    before = everything(case.model)
    trials = Trials(case.model, anatomy, as_calls(case.model, case.batch))
    for stack in anatomy.stacks:
        for intervention in interventions(stack):
            effect = trials.effect(intervention)
            if isinstance(effect, Effect):
                assert effect.low <= effect.change <= effect.high
                assert math.isfinite(effect.change)
            else:
                assert effect.endswith(".")
    assert changes(before, everything(case.model)) == []
