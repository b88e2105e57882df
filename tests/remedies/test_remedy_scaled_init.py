"""Scaled initialisation: which weights are shrunk, and by how much."""

import kinds
import pytest
import torch

import fullrank

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.mark.parametrize(("by", "factor"), [("gpt2", 6**-0.5), ("sqrt-depth", 3**-0.5), ("depth", 1 / 3)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "torch_encoder", "plain"])
def test_the_last_weights_of_each_branch_are_shrunk_and_nothing_else(name, by, factor):
    kind = kinds.build(name)
    (stack,) = kind.lists
    last = {f"{kind.lists[stack]}.{i}.{path[stack]}.weight" for i in range(3) for path in (kind.attention, kind.mlp)}
    before = {n: p.detach().clone() for n, p in kind.model.named_parameters()}
    with fullrank.repair(kind.model, "scaled-init", by=by, batch=kind.batch):
        for n, p in kind.model.named_parameters():
            expected = before[n] * factor if n in last else before[n]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=0)
