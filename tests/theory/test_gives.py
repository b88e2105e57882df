"""Every theory gives the metrics that it says it gives: no other anywhere, and each of them somewhere."""

import dataclasses

import pytest

from fullrank.architecture import Architecture
from fullrank.theory.catalogue import THEORIES

PLAIN = Architecture(depth=2, width=64, heads=4, context=48, std_q=0.1, std_k=0.1, correlation=0.2)
BARE = {"norm": "none", "placement": "none", "activation": "identity"}
WITNESSES = {
    "giorlandino_goldt": {},
    "noci": BARE,
    "wu_masks_layernorm": {"attention_skip": 0.0, "mlp_width": 0},
    "cowsik": {"correlation": 0.95},
    "batchnorm": BARE | {"norm": "batchnorm", "placement": "post", "attention_branch": 0.0, "mlp_skip": 0.0},
    "deepscalelm": {"activation": "relu"},
    "mind_the_gap": {},
}
"""Of each theory an architecture of which it gives all that it can."""


@pytest.mark.parametrize("one", THEORIES, ids=lambda one: one.key)
def test_of_its_witness_a_theory_gives_all_that_it_says_it_gives(one):
    architecture = dataclasses.replace(PLAIN, **WITNESSES[one.key])
    assert one.fit(architecture) > 0
    assert {row.metric for row in one.rows(architecture)} == set(one.gives)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("changed", WITNESSES.values(), ids=WITNESSES)
@pytest.mark.parametrize("one", THEORIES, ids=lambda one: one.key)
def test_of_any_other_it_gives_no_metric_beside_those(one, changed, mask):
    architecture = dataclasses.replace(PLAIN, stack="", mask=mask, **changed)
    rows = one.rows(architecture) if one.fit(architecture) > 0 else []
    assert {row.metric for row in rows} <= set(one.gives)
