"""What computes an output in the place of the kernel."""

import math

import kinds
import pytest
import torch
from torch.nn import functional

from fullrank import examine
from fullrank.edit import rewrite_attention
from fullrank.errors import EditError


def _plain(call):
    """Attention by definition, of the call as it is in the end."""
    heads = call.query.shape[1]
    K, V = (one.repeat_interleave(heads // one.shape[1], 1) for one in (call.key, call.value))
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    s = scale * call.query @ K.mT
    if call.bias is not None:
        s = s + call.bias
    if call.mask is not None and call.mask.dtype != torch.bool:
        s = s + call.mask
    seen = call.visible()
    s = s if seen is None else s.masked_fill(~seen, float("-inf"))
    return torch.softmax(s, -1).nan_to_num() @ V


@pytest.mark.parametrize("name", ["gpt2", "llama_padded", "bert", "t5", "vit"])
def test_attention_may_be_computed_by_a_function_that_sees_the_call_as_all_edits_made_it(name):
    kind = kinds.build(name)
    anatomy = kind.anatomy()

    def doubled(call):
        return call.change(query=2 * call.query)

    with torch.no_grad():
        with rewrite_attention(kind.model, anatomy, before=doubled):
            expected = kind()
        attended = rewrite_attention(kind.model, anatomy, before=lambda call: call.change(attend=_plain))
        with attended, rewrite_attention(kind.model, anatomy, before=doubled):
            found = kind()
    real = kind.batch["attention_mask"].bool() if name == "llama_padded" else torch.ones(found.shape[:2]).bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)


def test_a_kernel_of_torch_may_be_replaced_by_one_of_other_widths_and_numbers_of_keys():
    kind = kinds.build("torch_encoder")
    with torch.no_grad():
        expected = kind()

        def wider(call):
            K, V = functional.pad(call.key, (0, 8, 0, 1)), functional.pad(call.value, (0, 8, 0, 1))
            mask = functional.pad(call.mask.expand(*call.mask.shape[:-1], call.keys), (0, 1), value=float("-inf"))
            Q = functional.pad(call.query, (0, 8))
            out = functional.scaled_dot_product_attention(Q, K, V, mask, scale=call.query.shape[-1] ** -0.5)
            return out[..., : call.value.shape[-1]]

        with rewrite_attention(kind.model, kind.anatomy(), before=lambda call: call.change(attend=wider)):
            torch.testing.assert_close(kind(), expected, rtol=0, atol=1e-10)


def test_it_is_refused_where_no_queries_and_keys_are_shown():
    kind = kinds.build("plain_softmax")
    edit = rewrite_attention(kind.model, kind.anatomy(), before=lambda call: call.change(attend=_plain))
    with edit, pytest.raises(EditError, match="shows no queries and keys; set weights"):
        kind()


@pytest.mark.parametrize("name", ["plain_softmax", "llama_eager"])
def test_who_looks_at_a_model_that_softmaxes_by_itself_sees_the_map_that_an_edit_makes(name):
    """Scores of 0 where visible: the entropy of query t is log t; the metric leaves the first two out."""
    kind = kinds.build(name)

    def even(call):
        return call.change(logits=torch.where(call.visible(), 0.0, call.logits))

    with rewrite_attention(kind.model, kind.anatomy(), before=even):
        rows = examine(kind.model, kind.batch, spectrum=False).rows.where(metric="entropy", scope="all").rows
    assert len(rows) == 3 * 4
    for row in rows:
        assert row.value == pytest.approx(sum(math.log(t) for t in range(3, 10)) / 7, abs=1e-6)
