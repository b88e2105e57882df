"""T-Fixup: factors by role and stack, and that norms can go."""

import kinds
import pytest
import torch
from matrices import NAMES, matrices

import fullrank
from fullrank.remedies import repairs_in
from fullrank.zoo import Transformer, TransformerConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
DECODER, ENCODER = 27**-0.25, 0.67 * 3**-0.25  # three layers


@pytest.mark.parametrize("name", NAMES)
def test_values_outputs_and_the_mlp_are_shrunk_by_the_rule_of_their_stack_and_nothing_else(name):
    kind = kinds.build(name)
    before = matrices(name, kind.model)
    with fullrank.repair(kind.model, "t-fixup", batch=kind.batch):
        for key, W in matrices(name, kind.model).items():
            shrunk = key[2].removeprefix("cross.") in ("v", "o", "up", "down")
            factor = (DECODER if key[0] == "decoder" else ENCODER) if shrunk else 1.0
            torch.testing.assert_close(W, factor * before[key], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("gpt2", ["wte.weight", "wpe.weight"]),
        ("llama", ["embed_tokens.weight"]),
        ("t5", ["shared.weight"]),
        ("bert", [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]),
        ("vit", []),
    ],
)
def test_embeddings_are_shrunk_once_each(name, tables):
    kind = kinds.build(name)
    before = {n: p.detach().clone() for n, p in kind.model.named_parameters()}
    roles = {W.data_ptr() for W in matrices(name, kind.model).values()}
    assert roles
    with fullrank.repair(kind.model, "t-fixup", batch=kind.batch):
        changed = {n: p.detach().clone() for n, p in kind.model.named_parameters() if not torch.equal(p, before[n])}
    found = [n for n in changed if "embed" in n or n.startswith(("w", "shared"))]
    assert sorted(found) == sorted(tables)
    for n in found:
        torch.testing.assert_close(changed[n], DECODER * before[n], rtol=1e-14, atol=0)
    with fullrank.repair(kind.model, "t-fixup", embeddings=False, batch=kind.batch):
        assert all(torch.equal(kind.model.get_parameter(n), before[n]) for n in tables)


def test_without_norms_a_block_is_its_sum_alone_and_must_be_built_so():
    config = TransformerConfig(depth=2, width=16, heads=2, placement="post", vocabulary=20, context=8, positions="none")
    model, plain = (
        Transformer(config.with_(norm=norm, placement=placement), seed=0).double().eval()
        for norm, placement in (("layernorm", "post"), ("none", "none"))
    )
    batch = {"input_ids": torch.randint(20, (2, 8), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        with fullrank.repair(model, "t-fixup", norms="remove", batch=batch):
            shrunk = {n: p for n, p in model.state_dict().items() if n in plain.state_dict()}
            plain.load_state_dict(shrunk)
            torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-12)
            assert repairs_in(model)[0]["structural"]
        with fullrank.repair(model, "t-fixup", batch=batch):
            assert not repairs_in(model)[0]["structural"]


def test_a_deep_stack_without_norms_is_of_order_one_with_it_and_explodes_without():
    config = TransformerConfig(
        depth=24, width=32, heads=4, activation="relu", vocabulary=20, context=16, positions="none", biases=False,
        placement="post", embedding_std=32**-0.5,
    )  # fmt: skip
    model = Transformer(config, seed=0).double().eval()
    batch = {"input_ids": torch.arange(16)[None]}
    seen = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(float(output.square().mean())))

    def growth():
        with torch.no_grad():
            model(**batch)
            X = model.embedding(batch["input_ids"])
        return seen[-1] / float(X.square().mean())

    with fullrank.repair(model, "t-fixup", norms="remove", batch=batch):
        repaired = growth()
    bare = Transformer(config.with_(norm="none", placement="none"), seed=0).double().eval()
    model = bare
    bare.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(float(output.square().mean())))
    assert repaired < 10
    assert growth() > 100 * repaired
