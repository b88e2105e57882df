"""The argument that says which tokens are real is the one that attention of the stack follows."""

import copy

import kinds
import pytest
import torch

import fullrank
from fullrank.errors import FullrankError
from fullrank.remedies.residual.batch_norm import TokenBatchNorm

IDS = kinds.ids(3, 8)
SHORT = torch.tensor([[1] * 3 + [0] * 5, [1] * 8, [1] * 6 + [0] * 2])
SHORTER = torch.tensor([[1] * 8, [1] * 2 + [0] * 6, [1] * 5 + [0] * 3])
WHOLE = torch.ones_like(SHORT)
T5 = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1), "use_cache": False}


def norms_in(model):
    return {name: one for name, one in model.named_modules() if isinstance(one, TokenBatchNorm)}


def first_means(model, batch):
    """Of the first norm of each stack, as training with this batch alone makes it."""
    norms = norms_in(model)
    for one in norms.values():
        one.train()
        one.momentum = 1.0
    with torch.no_grad():
        model(**batch)
    return [
        next(one.mean.clone() for name, one in norms.items() if name.startswith(stack))
        for stack in ("encoder", "decoder")
    ]


def by_hand(model, batch, real, hidden):
    embedded = [model.shared(batch[name]) for name in ("input_ids", "decoder_input_ids")]
    return [X[mask.bool()].mean(0) for X, mask in zip(embedded, (real, hidden), strict=True)]


@pytest.mark.parametrize(
    ("given", "later", "real"),
    [
        ({"attention_mask": WHOLE}, {"attention_mask": SHORT}, (SHORT, WHOLE)),
        ({"decoder_attention_mask": WHOLE}, {"decoder_attention_mask": SHORT}, (WHOLE, SHORT)),
        (
            {"attention_mask": WHOLE, "decoder_attention_mask": WHOLE},
            {"attention_mask": SHORT, "decoder_attention_mask": SHORTER},
            (SHORT, SHORTER),
        ),
        (
            {"attention_mask": SHORT, "decoder_attention_mask": SHORT},
            {"attention_mask": SHORTER, "decoder_attention_mask": SHORT},
            (SHORTER, SHORT),
        ),
    ],
    ids=["source alone", "target alone", "both", "both alike"],
)
def test_source_and_target_of_one_length_have_masks_of_their_own(given, later, real):
    model = kinds.build("t5").model
    plain = copy.deepcopy(model)
    with fullrank.repair(model, "batch-norm", batch=T5 | given):
        found = first_means(model, T5 | later)
    for mean, expected in zip(found, by_hand(plain, T5, *real), strict=True):
        torch.testing.assert_close(mean.double(), expected.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [("token_type_ids", "attention_mask"), ("attention_mask", "token_type_ids")])
@pytest.mark.parametrize("mask", [WHOLE, SHORT])
def test_a_matrix_that_is_alike_and_means_something_else_is_no_mask(mask, order):
    model = kinds.build("bert").model
    given = {"input_ids": IDS} | dict.fromkeys(order, mask)
    with fullrank.repair(model, "batch-norm", batch=given):
        padding = next(iter(norms_in(model).values())).padding
        assert padding.masks == {"encoder": ("attention_mask", "real")}


def test_where_no_argument_is_followed_a_later_mask_is_refused():
    model = kinds.build("bert").model
    given = {"input_ids": IDS, "token_type_ids": WHOLE}
    with torch.no_grad(), fullrank.repair(model, "batch-norm", batch=given):
        assert next(iter(norms_in(model).values())).padding.masks == {}
        model(**given)
        with pytest.raises(FullrankError, match="repair it with a padded batch"):
            model(**given, attention_mask=SHORT)


def test_looking_leaves_the_arguments_as_they_are():
    model = kinds.build("bert").model
    mask, types = WHOLE.clone(), WHOLE.clone()
    given = {"input_ids": IDS, "token_type_ids": types, "attention_mask": mask}
    with fullrank.repair(model, "batch-norm", batch=given):
        assert torch.equal(mask, WHOLE)
        assert torch.equal(types, WHOLE)
