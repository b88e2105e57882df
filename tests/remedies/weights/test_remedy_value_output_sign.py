"""The sign of what attention writes: eigenvalues of W_V W_O, the least change, and whether tokens become alike."""

import kinds
import pytest
import torch
from matrices import NAMES, matrices

import fullrank
from fullrank.errors import RemedyError
from fullrank.zoo import Transformer, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def per_head(name, found, stack, layer):
    """(W_V, W_O) of every query head; two query heads of the llama share a W_V."""
    v, o = (found[stack, layer, role] for role in "vo")
    values = v.split(8)
    values = [each for each in values for _ in range(4 // len(values))]
    return list(zip(values, o.split(8, dim=1), strict=True))


def written(name, found, stack, layer):
    return sum(o @ v for v, o in per_head(name, found, stack, layer))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("sign", "s"), [("negative", -1), ("positive", 1)])
@pytest.mark.parametrize("method", ["tie", "nearest"])
def test_all_eigenvalues_have_the_sign_and_none_is_larger_than_one_in_size(name, sign, s, method):
    kind = kinds.build(name)
    before = matrices(name, kind.model)
    with fullrank.repair(kind.model, "value-output-sign", sign=sign, method=method, batch=kind.batch):
        found = matrices(name, kind.model)
    for (stack, layer, role), W in found.items():
        if role != "o":
            assert torch.equal(W, before[stack, layer, role])
            continue
        H = written(name, found, stack, layer)
        torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-10)
        lam = s * torch.linalg.eigvalsh(H)
        assert lam.min() > -1e-10
        assert 0.01 < lam.max() < 1 + 1e-10


@pytest.mark.parametrize("name", ["gpt2", "llama", "torch_encoder"])
def test_tied_heads_are_the_transposed_values_at_the_old_size(name):
    kind = kinds.build(name)
    before = matrices(name, kind.model)
    with fullrank.repair(kind.model, "value-output-sign", largest=None, batch=kind.batch):
        found = matrices(name, kind.model)
    for stack, layer, role in found:
        if role == "o":
            pairs = zip(per_head(name, before, stack, layer), per_head(name, found, stack, layer), strict=True)
            for (v, old), (_, o) in pairs:
                torch.testing.assert_close(o, -v.mT * old.norm() / v.norm(), rtol=1e-10, atol=1e-14)


def test_the_nearest_product_is_nearer_than_any_other_that_is_tried_and_stays_where_it_already_fits():
    kind = kinds.build("plain")
    before = matrices("plain", kind.model)
    options = {"method": "nearest", "largest": None, "batch": kind.batch}
    with fullrank.repair(kind.model, "value-output-sign", **options):
        found = matrices("plain", kind.model)
    generator = torch.Generator().manual_seed(0)
    for (v, old), (_, o) in zip(per_head("", before, "decoder", 2), per_head("", found, "decoder", 2), strict=True):
        least = (o @ v - old @ v).norm()
        for size in (1e-3, 1e-2, 0.1, 1.0):
            for _ in range(20):
                # another semidefinite product with the same values: W_O W_V = −W_Vᵀ(P + …)W_V
                P = -torch.linalg.pinv(v.mT) @ o
                root = torch.linalg.eigh((P + P.mT) / 2)
                root = root[1] * root[0].clamp(min=0).sqrt()
                root = root + size * root.norm() * torch.randn(8, 8, generator=generator).double() / 8
                other = -v.mT @ (root @ root.mT)
                assert (other @ v - old @ v).norm() >= least - 1e-9
    fullrank.repair(kind.model, "value-output-sign", **options)
    again = fullrank.remedies.weights.value_output_sign.nearest
    for v, o in per_head("", found, "decoder", 2):
        torch.testing.assert_close(again(v, o, -1.0), o, rtol=0, atol=1e-9)


def test_flipping_turns_heads_of_positive_trace_and_leaves_the_rest_bit_for_bit():
    kind = kinds.build("gpt2")
    before = matrices("gpt2", kind.model)
    with fullrank.repair(kind.model, "value-output-sign", method="flip", batch=kind.batch):
        found = matrices("gpt2", kind.model)
    turned = 0
    for layer in (1, 2, 3):
        pairs = zip(per_head("", before, "decoder", layer), per_head("", found, "decoder", layer), strict=True)
        for (v, old), (_, o) in pairs:
            positive = float((old @ v).trace()) > 0
            turned += positive
            assert torch.equal(o, -old if positive else old)
    assert 0 < turned < 12


def test_values_that_are_not_read_off_the_stream_are_refused():
    kind = kinds.build("t5")
    state = {n: p.detach().clone() for n, p in kind.model.named_parameters()}
    cross = fullrank.repair(kind.model, "value-output-sign", batch=kind.batch)
    changed = [n for n, p in kind.model.named_parameters() if not torch.equal(p, state[n])]
    assert changed
    assert not [n for n in changed if "EncDec" in n]
    cross.undo()
    config = TransformerConfig(depth=2, width=16, heads=2, vocabulary=20, context=8)
    model = Transformer(config, seed=0).double().eval()
    model.blocks[0].attention.inner.value.weight.requires_grad_(False).zero_()
    with pytest.raises(RemedyError, match=r"W_V of head 1 .* is zero"):
        fullrank.repair(model, "value-output-sign", batch={"input_ids": torch.arange(8)[None]})


@pytest.mark.parametrize("method", ["tie", "nearest", "flip"])
def test_outputs_of_zero_have_no_sign_to_be_given(method):
    kind = kinds.build("llama")
    output = kind.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        output[:, 8:16] = 0
    before = {n: p.detach().clone() for n, p in kind.model.named_parameters()}
    with pytest.raises(RemedyError, match=r"W_O of head 2 of decoder layer 2 is zero"):
        fullrank.repair(kind.model, "value-output-sign", method=method, batch=kind.batch)
    assert all(torch.equal(p, before[n]) for n, p in kind.model.named_parameters())


def test_an_output_that_two_layers_share_is_refused_unless_they_share_the_values_too():
    kind = kinds.build("llama")
    first, second = (layer.self_attn for layer in kind.model.layers[:2])
    second.o_proj.weight = first.o_proj.weight
    with pytest.raises(RemedyError, match=r"W_O of decoder layer 2 serves another layer too, of which W_V differs"):
        fullrank.repair(kind.model, "value-output-sign", batch=kind.batch)
    second.v_proj.weight = first.v_proj.weight
    with fullrank.repair(kind.model, "value-output-sign", batch=kind.batch):
        values = first.v_proj.weight.detach().split(8)
        heads = [each for each in values for _ in range(4 // len(values))]
        H = sum(o @ v for v, o in zip(heads, first.o_proj.weight.detach().split(8, dim=1), strict=True))
        assert float(torch.linalg.eigvalsh((H + H.mT) / 2).max()) < 1e-10


def test_modes_are_no_larger_than_one_where_maps_have_none_below_zero_and_below_two_always():
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(6, 6, generator=generator).double()
    H = -V @ V.mT / torch.linalg.matrix_norm(V @ V.mT, 2)  # eig H in [−1, 0], as the remedy makes it

    def largest(A):
        """Of X ↦ X + AXH, as one matrix on all entries of X."""
        whole = torch.eye(6 * len(A)).double() + torch.kron(A, H.mT.contiguous())
        return float(torch.linalg.eigvals(whole).abs().max())

    G = torch.randn(8, 8, generator=generator).double()
    kernel = (-torch.cdist(G, G).square() / 8).exp()  # positive definite, and so is its map up to similarity
    A = kernel / kernel.sum(1, keepdim=True)
    assert torch.linalg.eigvals(A).real.min() > 0
    assert largest(A) < 1 + 1e-12
    swapped = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)  # eigenvalues 1 and −0.8
    assert largest(swapped) == pytest.approx(1.8, rel=1e-9)
    for _ in range(20):
        A = torch.softmax(3 * torch.randn(8, 8, generator=generator).double(), -1)
        assert largest(A) < 2


def residual_after(depth, seed, **options):
    """Attention and skip alone, 32 tokens, no norms, heads with maps of their own."""
    config = TransformerConfig(
        depth=depth, width=32, heads=4, mlp_width=0, placement="none", norm="none", positions="none", biases=False,
        vocabulary=8, context=32, qk_norm=True,
    )  # fmt: skip
    model = Transformer(config, seed=seed).double().eval()
    X = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(seed)).double()
    if options:
        fullrank.repair(model, "value-output-sign", batch={"inputs_embeds": X}, **options)
    seen = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(inputs_embeds=X)
    return float((seen[0] - seen[0].mean(0)).norm() / seen[0].norm())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokens_stay_apart_where_it_is_negative_and_become_alike_where_it_is_positive_or_random(seed):
    negative = residual_after(40, seed, sign="negative")
    positive = residual_after(40, seed, sign="positive")
    random, flipped = residual_after(40, seed), residual_after(40, seed, method="flip")
    assert negative > 0.95
    assert positive < 0.05
    assert random < 0.3
    assert flipped < 0.6  # its sign is that of a mean of eigenvalues: this is no remedy for random weights
