"""xformers' memory-efficient attention, by a stand-in of the same signature: read as it computes."""

from __future__ import annotations

import sys

import kernels
import pytest
import torch
from calling import GROUPS, HEADS, LENGTHS, TOKENS, WIDTH, assert_read, looked_at
from kernels import XFORMERS, module_of
from plain import states


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """The package is loaded, as it is in a program that uses it."""
    monkeypatch.setitem(sys.modules, "xformers", module_of("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module_of("xformers.ops", *XFORMERS))
    function = kernels.memory_efficient_attention  # as `from … import …` does
    monkeypatch.setattr(sys.modules[__name__], function.__name__, function, raising=False)


def _bias(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


BIASES = {
    "none": None,
    "lower triangular": kernels.LowerTriangularMask(),
    "lower triangular with a bias": kernels.LowerTriangularMaskWithTensorBias(_bias(3, HEADS, TOKENS, TOKENS)),
    "a bias": _bias(3, HEADS, TOKENS, TOKENS),
    "a bias for all": _bias(1, 1, TOKENS, TOKENS).expand(3, HEADS, -1, -1),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
@pytest.mark.parametrize("scale", [None, 0.6])
def test_memory_efficient_attention_is_read_as_it_computes(bias, scale):
    keep, _, outputs = looked_at(lambda q, k, v: memory_efficient_attention(q, k, v, bias, 0.0, scale))
    assert_read(keep, outputs)
    causal = isinstance(bias, kernels.LowerTriangularMask)
    assert all(call.causal == causal for call in keep.calls)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_on_the_diagonal_keep_sequences_apart(causal):
    bias = kernels.BlockDiagonalMask(LENGTHS, LENGTHS, causal)
    keep, _, outputs = looked_at(
        lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias),
        states(1, sum(LENGTHS)),
    )
    assert_read(keep, outputs)
    seen = [n if not causal else i + 1 for n in LENGTHS for i in range(n)]
    assert keep.calls[0].attention.visible_count().squeeze().tolist() == seen


def test_one_head_without_an_axis_of_its_own():
    def attention(q, k, v):
        return memory_efficient_attention(*(x.squeeze(2) for x in (q, k, v)), _bias(3, TOKENS, TOKENS)).unsqueeze(2)

    keep, _, outputs = looked_at(attention, heads=1, groups=1)
    assert_read(keep, outputs)


def test_groups_of_query_heads_in_five_dimensions():
    def attention(q, k, v):
        q = q.view(3, TOKENS, GROUPS, HEADS // GROUPS, WIDTH)
        k, v = (x[:, :, :, None].expand(-1, -1, -1, HEADS // GROUPS, -1) for x in (k, v))
        return memory_efficient_attention(q, k, v, attn_bias=kernels.LowerTriangularMask()).flatten(2, 3)

    keep, _, outputs = looked_at(attention, groups=GROUPS)
    assert_read(keep, outputs)
    assert keep.calls[0].value.shape[1] == GROUPS


def test_a_bias_that_does_not_write_itself_out_is_said():
    class Silent(kernels.AttentionBias):
        """Answers the kernel and nobody else."""

        def __init__(self):
            self.asked = 0

        def materialize(self, shape, dtype=torch.float32, device="cpu"):
            self.asked += 1
            if self.asked > 1:
                raise NotImplementedError
            return torch.zeros(shape)

    keep, recorder, _ = looked_at(lambda q, k, v: memory_efficient_attention(q, k, v, Silent()))
    assert not keep.calls
    assert any("its Silent cannot be written out as a tensor" in note for note in recorder.notes)
