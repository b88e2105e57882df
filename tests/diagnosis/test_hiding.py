"""A key hidden from the queries of other tokens: which pairs, and that no query is left without any."""

import torch

from fullrank.diagnosis.hiding import hidden_keys, hide
from fullrank.edit import Call, Place


def call(mask: torch.Tensor | None = None, *, queries: int = 4, **more) -> Call:
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(2, 3, n, 8, generator=generator) for n in (queries, 4, 4))
    return Call(Place("encoder", 1, "self", "a"), "scaled_dot_product_attention", V, query=Q, key=K, mask=mask, **more)


def test_a_query_that_sees_nothing_else_keeps_the_key():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 2] = torch.tensor([True, False, False, False])  # sees the hidden key alone
    mask[0, 0, 3] = torch.tensor([False, True, True, True])  # does not see it
    hidden = hidden_keys(call(mask), None, 0, same=True, causal=False)
    assert hidden[0, 0].nonzero().tolist() == [[1, 0]]  # query 0 is the key's own token


def test_positions_count_real_keys():
    real = torch.tensor([[False, True, True, True], [True, True, False, False]])
    hidden = hidden_keys(call(), real, 1, same=False, causal=False)
    assert hidden[:, 0, 0].nonzero().tolist() == [[0, 2], [1, 1]]
    assert hidden_keys(call(), real, 2, same=False, causal=False).any((1, 2, 3)).tolist() == [True, False]


def test_the_last_queries_of_a_causal_call_are_the_last_keys():
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()[:, :, 2:]
    hidden = hidden_keys(call(mask, queries=2), None, 2, same=True, causal=True)
    assert hidden[0, 0].nonzero().tolist() == [[1, 2]]
    pooled = hidden_keys(call(mask, queries=2), None, 2, same=True, causal=False)
    assert pooled[0, 0].nonzero().tolist() == [[0, 2], [1, 2]]


def test_what_hides_nothing_is_the_call_itself():
    plain = call()
    assert hide(plain, torch.zeros(1, 1, 4, 4, dtype=torch.bool)) is plain
    hidden = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hidden[..., 1:, 0] = True
    made = hide(plain, hidden, [1])
    assert made.bias.isinf().nonzero()[:, 1].unique().tolist() == [1]
