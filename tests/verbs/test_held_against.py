"""Target dtypes and the optimiser's epsilon: refused where they are none, and heard by the verdicts."""

from __future__ import annotations

import pytest
import torch
from plain import PlainGPT, sharp, tokens

import fullrank
from fullrank.errors import BatchError


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"target_dtypes": ("float16", "int8")}, "target_dtypes: 'int8' is not one of float16"),
        ({"target_dtypes": "float12"}, "target_dtypes: 'float12' is not one of"),
        ({"epsilon": 0.0}, "epsilon=0.0; an optimiser's epsilon"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
    ],
)
def test_what_is_none_is_refused(asked, sentence):
    with pytest.raises(BatchError, match=sentence):
        fullrank.examine(sharp(PlainGPT()), tokens(), **asked)


def test_a_stream_beyond_the_range_of_a_dtype_is_said_where_that_is_asked_about():
    model = sharp(PlainGPT())
    with torch.no_grad():
        model.wte.weight.mul_(1e6)
    how = {"spectrum": False, "reference": False}
    plain = fullrank.examine(model, tokens(), **how)
    asked = fullrank.examine(model, tokens(), target_dtypes=("float16",), **how)
    assert not [one for one in plain.verdicts if one.name == "numerics"]
    (verdict,) = [one for one in asked.verdicts if one.name == "numerics"]
    assert "float16" in verdict.claim
