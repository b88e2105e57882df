"""Rewriting what a block makes of its stream and a branch: twins by hand, layouts, gradients, compilers, refusals."""

from __future__ import annotations

import copy
import pickle
import types
import warnings

import pytest
import torch
from kinds import KINDS, build, seen
from plain import InPlaceBlock, ParallelBlock, PlainGPT, sharp, states, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from fullrank.capture import survey
from fullrank.edit import edits_in, find_branches, replace_stream, rewrite_attention, rewrite_residual, scale_branch
from fullrank.errors import EditError
from untouched import changes, everything


def mixed(X, F):
    """No function of X + F, nor symmetric in the two."""
    return 0.8 * X + torch.tanh(F) - 0.1 * F.mean(1, keepdim=True)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7).double()), nn.Parameter(torch.full((32,), 0.3).double())

    def forward(self, X, F):
        return self.a * X + self.b * F


def rewritten(kind, of, function, **where):
    return rewrite_residual(kind.model, seen(of), find_branches(kind.model, kind, seen(of)), function, **where)


# ---------------------------------------------------------------- twins: the blocks by hand


def gpt2_by_hand(block, f):
    def forward(x, past_key_values=None, *rest, attention_mask=None, **more):
        x = f(x, block.attn(block.ln_1(x), attention_mask=attention_mask)[0])
        return f(x, block.mlp(block.ln_2(x)))

    return forward


def llama_by_hand(block, f):
    def forward(x, **more):
        x = f(x, block.self_attn(hidden_states=block.input_layernorm(x), **more)[0])
        return f(x, block.mlp(block.post_attention_layernorm(x)))

    return forward


def bert_by_hand(block, f):
    def forward(x, mask=None, *rest, **more):
        own = block.attention
        x = own.output.LayerNorm(f(x, own.output.dense(own.self(x, attention_mask=mask)[0])))
        return block.output.LayerNorm(f(x, block.output.dense(block.intermediate(x))))

    return forward


def vit_by_hand(block, f):
    def forward(x, *rest, **more):
        x = f(x, block.attention(block.layernorm_before(x))[0])
        return f(x, block.mlp(block.layernorm_after(x)))

    return forward


def t5_by_hand(block, f):
    def forward(x, mask=None, bias=None, *rest, position_bias=None, attention_mask=None, **more):
        own, mlp = block.layer
        bias = bias if position_bias is None else position_bias
        mask = mask if attention_mask is None else attention_mask
        added, bias, _ = own.SelfAttention(own.layer_norm(x), mask=mask, position_bias=bias)
        x = f(x, added)
        return f(x, mlp.DenseReluDense(mlp.layer_norm(x))), bias, None

    return forward


def torch_by_hand(block, f):
    def forward(x, src_mask=None, src_key_padding_mask=None, is_causal=False):
        def tokens_of(state):
            return state if block.self_attn.batch_first else state.transpose(0, 1)

        def g(X, F):
            return tokens_of(f(tokens_of(X), tokens_of(F)))

        def attention(z):
            return block.self_attn(z, z, z, key_padding_mask=src_key_padding_mask, need_weights=False)[0]

        def mlp(z):
            return block.linear2(torch.relu(block.linear1(z)))

        if block.norm_first:
            x = g(x, attention(block.norm1(x)))
            return g(x, mlp(block.norm2(x)))
        x = block.norm1(g(x, attention(x)))
        return block.norm2(g(x, mlp(x)))

    return forward


def plain_by_hand(block, f):
    def forward(x):
        x = f(x, block.attn(block.ln_1(x)))
        return f(x, block.mlp(block.ln_2(x)))

    return forward


BY_HAND = {
    "gpt2": gpt2_by_hand,
    "llama": llama_by_hand,
    "llama_padded": llama_by_hand,
    "bert": bert_by_hand,
    "vit": vit_by_hand,
    "t5": t5_by_hand,
    "torch_encoder": torch_by_hand,
    "torch_tokens_first": torch_by_hand,
    "plain": plain_by_hand,
}


def loss_and_gradients(kind):
    kind.model.zero_grad()
    output = kind()
    probe = torch.linspace(-1, 1, output.numel()).reshape(output.shape).double()
    (output * probe).sum().backward()
    return output.detach(), {n: p.grad.clone() for n, p in kind.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", BY_HAND)
def test_it_is_the_block_written_by_hand_with_another_addition(name):
    kind = build(name)
    stack = seen(name).stacks[0].name
    with rewritten(kind, name, mixed, stack=stack):
        edited, gradients = loss_and_gradients(kind)
    base, _ = loss_and_gradients(kind)
    for block in kind.blocks(stack):
        block.forward = BY_HAND[name](block, mixed)
    twin, theirs = loss_and_gradients(kind)
    assert not torch.allclose(edited, base, atol=1e-3)
    assert torch.allclose(edited, twin, atol=1e-5 if name == "t5" else 1e-10)  # its norms are in float32
    assert gradients.keys() == theirs.keys()
    for parameter, gradient in gradients.items():
        size = max(1.0, float(theirs[parameter].abs().max()))
        assert torch.allclose(gradient, theirs[parameter], atol=1e-5 * size), parameter


def test_pre_norm_of_torch_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = states().double()

    def forward():
        return model(x)

    anatomy = survey(model, forward)
    branches = find_branches(model, forward, anatomy)
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(True)  # it is left while something in it is edited
        with rewrite_residual(model, anatomy, branches, mixed):
            edited = forward()
        for block in model.layers:
            block.forward = torch_by_hand(block, mixed)
        assert torch.allclose(edited, forward(), atol=1e-10)


@pytest.mark.parametrize("name", [*KINDS, "albert"])
def test_the_plain_sum_changes_no_bit_and_scaling_is_scaling_the_branch(name):
    kind = build(name)
    before = everything(kind.model)
    branches = find_branches(kind.model, kind, seen(name))
    with torch.no_grad():
        base = kind()
        with rewritten(kind, name, lambda X, F: X + F):
            assert torch.equal(kind(), base)
        for where in ({}, {"layer": 2}):
            with scale_branch(kind.model, branches, by=0.5, **where):
                scaled = kind()
            with rewritten(kind, name, lambda X, F: X + 0.5 * F, **where) as edit:
                assert torch.allclose(kind(), scaled, atol=1e-5 if name in ("gemma2", "t5") else 1e-10)
                assert not torch.allclose(scaled, base, atol=1e-4)
            assert not edit.in_force
        assert torch.equal(kind(), base)
    assert not changes(before, everything(kind.model))


@pytest.mark.parametrize("branch", ["attention", "cross", "mlp"])
def test_one_branch_of_one_layer(branch):
    kind = build("t5")
    branches = find_branches(kind.model, kind, seen("t5"))
    where = {"stack": "decoder", "layer": 2, "branch": branch}
    with torch.no_grad():
        with scale_branch(kind.model, branches, by=-1.0, **where):
            scaled = kind()
        with rewrite_residual(kind.model, seen("t5"), branches, lambda X, F: X - F, **where) as edit:
            assert torch.allclose(kind(), scaled, atol=1e-6)
    assert edit.where == (f"decoder layer 2 {branch} (decoder.block.1)",)


# ---------------------------------------------------------------- ways to write an addition


class Method(nn.Module):
    """x + f(x) in one of the ways people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.attn, self.way = nn.Linear(32, 32), way

    def forward(self, x):
        y = self.attn(x)
        if self.way == "operator":
            return x + y
        if self.way == "the branch first":
            return y + x
        if self.way == "difference":
            return x - -y
        if self.way == "function":
            return torch.add(x, y)
        if self.way == "method":
            return y.add(x)
        if self.way == "alpha":
            return torch.add(x, y, alpha=0.5)
        if self.way == "alpha of the stream":
            return torch.add(y, x, alpha=0.5)
        if self.way == "dropout, cast, factor":
            return x + 0.5 * nn.functional.dropout(y.float(), 0.1, self.training).to(x.dtype)
        if self.way == "flat":
            return (x.reshape(-1, 32) + y.reshape(-1, 32)).view_as(x)
        x = x.clone()
        if self.way == "into the stream":
            x += y
            return x
        if self.way == "into the stream, by method":
            x.add_(y)
            return x
        y += x
        return y


WAYS = {
    "operator": (1, 1),
    "the branch first": (1, 1),
    "function": (1, 1),
    "method": (1, 1),
    "alpha": (1, 0.5),
    "alpha of the stream": (0.5, 1),
    "dropout, cast, factor": (1, 0.5),
    "flat": (1, 1),
    "into the stream": (1, 1),
    "into the stream, by method": (1, 1),
    "into the branch": (1, 1),
}


def of_ways(way, layers=2):
    model = sharp(nn.Sequential(*(Method(way) for _ in range(layers)))).double()
    x = states(width=32).double()
    return model, x, survey(model, lambda: model(x))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_an_addition(way):
    model, x, anatomy = of_ways(way)
    branches = find_branches(model, lambda: model(x), anatomy)
    assert not branches.notes
    a, b = WAYS[way]
    seen_of_x = []

    def f(X, F):
        seen_of_x.append((X, X.detach().clone()))
        return torch.sin(X) * F + X

    expected = x
    for block in model:
        y = b * block.attn(expected)
        expected = torch.sin(a * expected) * y + a * expected
    with rewrite_residual(model, anatomy, branches, f):
        output = model(x)
        assert torch.allclose(output, expected, atol=1e-6 if "cast" in way else 1e-12)
        output.square().sum().backward()
    assert len(seen_of_x) == 2 and all(torch.equal(X, kept) for X, kept in seen_of_x)  # nobody wrote into it
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.square().sum().backward()
    for mine, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(mine, parameter.grad, atol=1e-4 if "cast" in way else 1e-10)


@pytest.mark.parametrize("block", [InPlaceBlock, ParallelBlock])
def test_blocks_that_write_into_the_stream_and_parallel_ones(block):
    model = sharp(PlainGPT(block=block)).double()
    anatomy = survey(model, lambda: model(tokens()))
    branches = find_branches(model, lambda: model(tokens()), anatomy)
    with torch.no_grad():
        with scale_branch(model, branches, by=0.25, branch="mlp"):
            scaled = model(tokens())
        with rewrite_residual(model, anatomy, branches, lambda X, F: X + 0.25 * F, branch="mlp"):
            assert torch.allclose(model(tokens()), scaled, atol=1e-12)


def test_branches_that_are_summed_first_are_one_addition():
    kind = build("falcon")
    branches = find_branches(kind.model, kind, seen("falcon"))
    with torch.no_grad():
        base = kind()
        with rewritten(kind, "falcon", lambda X, F: X + 0.5 * F) as edit:
            edited = kind()
        with scale_branch(kind.model, branches, by=0.5):
            assert torch.allclose(edited, kind(), atol=1e-12)
        assert edit.where[0] == "decoder layer 1 mlp and attention (h.0)"
        message = (
            "mlp and attention of decoder layer 1 are summed before they are added to the stream: leave branch='mlp'"
        )
        with pytest.raises(EditError, match=message):
            rewritten(kind, "falcon", mixed, branch="mlp")
        assert not edits_in(kind.model)
        assert torch.equal(kind(), base)


def test_the_result_has_the_type_of_the_sum():
    kind = build("plain")
    kind.model.bfloat16()
    types = []

    def f(X, F):
        types.append((X.dtype, F.dtype))
        return X.float() + F.float()

    with torch.no_grad(), rewritten(kind, "plain", f):
        assert kind().dtype == torch.bfloat16
    assert set(types) == {(torch.bfloat16, torch.bfloat16)}
    kind = build("plain")
    kind.model.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), rewritten(kind, "plain", lambda X, F: X + F):
        edited = kind()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edited, kind())


# ---------------------------------------------------------------- another number of tokens


def halved(X, F):
    return (X + F)[:, ::2]


def test_later_layers_get_fewer_tokens():
    kind = build("vit")
    model = kind.model
    with torch.no_grad():
        with rewritten(kind, "vit", halved, layer=2, branch="attention"):
            edited = kind()
        model.layers[1].forward = vit_by_hand(model.layers[1], None)

        def forward(x, *rest, **more):
            block = model.layers[1]
            x = halved(x, block.attention(block.layernorm_before(x))[0])
            return x + block.mlp(block.layernorm_after(x))

        model.layers[1].forward = forward
        assert edited.shape == (2, 9, 32)
        assert torch.allclose(edited, kind(), atol=1e-12)


@pytest.mark.parametrize("name", ["torch_tokens_first", "torch_encoder"])
def test_more_tokens_in_any_layout(name):
    kind = build(name)
    kind.batch.pop("src_key_padding_mask", None)

    def doubled(X, F):
        return torch.cat([X, F], 1)

    with torch.no_grad(), rewritten(kind, name, doubled, layer=3, branch="mlp"):
        grown = kind()
    assert grown.shape == ((18, 3, 32) if name == "torch_tokens_first" else (3, 18, 32))


# ---------------------------------------------------------------- modules, copies, other edits


@pytest.mark.parametrize("name", ["gpt2", "bert", "torch_encoder"])
def test_a_module_becomes_a_child_of_the_blocks(name):
    kind = build(name)
    names = set(kind.model.state_dict())
    gate = Gate()
    edit = rewritten(kind, name, gate, layer=2, name="gate")
    path = seen(name).stacks[0].paths[1]
    assert set(kind.model.state_dict()) - names == {f"{path}.gate_{b}.{p}" for b in ("attention", "mlp") for p in "ab"}
    assert edit.parameters == 33
    kind().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.parameters())
    edit.undo()
    assert set(kind.model.state_dict()) == names
    edit = rewritten(kind, name, gate, layer=1, branch="mlp", name="gate")
    assert f"{seen(name).stacks[0].paths[0]}.gate.a" in kind.model.state_dict()
    other = copy.copy(kind)
    other.model = copy.deepcopy(kind.model)
    with torch.no_grad():
        edited = kind()
        assert torch.equal(other(), edited)
        again = copy.copy(kind)
        again.model = pickle.loads(pickle.dumps(kind.model))
        assert torch.equal(again(), edited)
        gate.a.zero_()
        assert torch.equal(other(), edited)  # its gate is its own
        edit.undo()
        assert torch.equal(other(), edited)


def test_with_other_edits_in_any_order():
    kind = build("gpt2")
    anatomy, branches = seen("gpt2"), find_branches(kind.model, kind, seen("gpt2"))
    makers = [
        lambda: rewrite_residual(kind.model, anatomy, branches, lambda X, F: 0.9 * X + F),
        lambda: scale_branch(kind.model, branches, by=lambda F: torch.sin(F) + F),
        lambda: rewrite_attention(kind.model, anatomy, after=lambda call, output: output + 1),
        lambda: replace_stream(kind.model, anatomy, lambda X: X + 1, layer=1),
    ]
    outputs = []
    with torch.no_grad():
        base = kind()
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
            edits = [makers[index]() for index in order]
            outputs.append(kind())
            for edit in edits[:2] + edits[:1:-1]:
                edit.undo()
            assert torch.equal(kind(), base)
    assert all(torch.allclose(one, outputs[0], atol=1e-12) for one in outputs)


def test_of_two_edits_the_last_sees_the_sum_that_the_first_makes():
    kind = build("llama")
    with torch.no_grad():
        with (
            rewritten(kind, "llama", lambda X, F: X + 0.5 * F),
            rewrite_residual(
                kind.model, seen("llama"), find_branches(kind.model, kind, seen("llama")), lambda X, F: 0.5 * X + F
            ),
        ):
            both = kind()
        with rewritten(kind, "llama", lambda X, F: 0.5 * (X + F)):
            assert torch.allclose(both, kind(), atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_branches_are_found_in_a_model_whose_additions_are_rewritten(name):
    kind = build(name)
    branches = find_branches(kind.model, kind, seen(name))
    with rewritten(kind, name, mixed):
        assert find_branches(kind.model, kind, seen(name)) == branches
    if name == "vit":
        with rewritten(kind, name, halved, layer=2, branch="attention"):
            assert find_branches(kind.model, kind, seen(name)) == branches


# ---------------------------------------------------------------- checkpointing and compilers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointed(name, reentrant):
    kind = build(name)
    rewritten(kind, name, mixed, branch="mlp")
    rewritten(kind, name, Gate(), branch="attention")
    _, plain = loss_and_gradients(kind)
    kind.model.train()
    for module in kind.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            kind.model.enable_input_require_grads()
        _, found = loss_and_gradients(kind)
    assert found.keys() == plain.keys()
    assert all(torch.allclose(found[key], plain[key], rtol=1e-8, atol=1e-8) for key in plain)


class Sparing(nn.Module):
    """A block that repeats its MLP in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.reentrant, self.spare = reentrant, False

    def forward(self, x):
        z = self.norm(x)
        return x + (checkpoint(self.mlp, z, use_reentrant=self.reentrant) if self.spare else self.mlp(z))


class Whole(Method):
    """A block that checkpoints the part of itself in which it adds."""

    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant) if x.requires_grad else super().forward(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_addition_in_a_checkpointed_part_of_a_block_is_refused_and_never_repeated_without_the_edit(reentrant):
    model = sharp(nn.Sequential(Whole("operator"), Whole("operator"))).double()
    x = states(width=32).double()
    for block in model:
        block.reentrant = reentrant
    anatomy = survey(model, lambda: model(x))
    branches = find_branches(model, lambda: model(x), anatomy)
    with rewrite_residual(model, anatomy, branches, mixed):
        with torch.no_grad():
            model(x)
        with pytest.raises(EditError, match="inside a part of the block that the block itself checkpoints"):
            model(x.clone().requires_grad_())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_of_a_block_that_is_checkpointed(reentrant):
    model = sharp(nn.Sequential(Sparing(reentrant), Sparing(reentrant))).double()
    x = states(width=32).double()
    anatomy = survey(model, lambda: model(x))
    branches = find_branches(model, lambda: model(x), anatomy)
    gradients = []
    with rewrite_residual(model, anatomy, branches, mixed):
        for spare in (False, True):
            for block in model:
                block.spare = spare
            model.zero_grad()
            model(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


def test_a_shared_block_is_told_apart_by_layer():
    kind = build("albert")
    branches = find_branches(kind.model, kind, seen("albert"))
    seen_by_layer = []

    def f(X, F):
        seen_by_layer.append(X)
        return X + F

    with torch.no_grad(), rewrite_residual(kind.model, seen("albert"), branches, f, layer=2, branch="mlp"):
        kind()
    assert len(seen_by_layer) == 1


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_of(model):
    return torch.compile(lambda *args, **more: model(*args, **more), backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("block", [InPlaceBlock, None])
def test_compiled_before_and_after(block, fresh_compiler):
    model = sharp(PlainGPT(layers=2, **({} if block is None else {"block": block}))).double()
    anatomy = survey(model, lambda: model(tokens()))
    branches = find_branches(model, lambda: model(tokens()), anatomy)
    run = compiled_of(model)
    with torch.set_grad_enabled(block is None):  # the model's own writing into its stream has no gradient
        base = model(tokens())
        assert torch.allclose(run(tokens()), base, atol=1e-10)
    edit = rewrite_residual(model, anatomy, branches, Gate())
    gradients = []
    for call in (model, run):
        model.zero_grad()
        with torch.set_grad_enabled(block is None):
            output = call(tokens())
        if block is None:
            output.square().sum().backward()
        gradients.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-8) for a, b in zip(*gradients, strict=True))
    assert not torch.allclose(gradients[0][0], base, atol=1e-3)
    edit.undo()
    with torch.no_grad():
        assert torch.allclose(run(tokens()), base, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "torch_with_weights", "falcon"])
def test_models_are_compiled_in_one_graph(name, fresh_compiler):
    kind = build(name)
    run = compiled_of(kind.model)
    with torch.no_grad(), rewritten(kind, name, mixed):
        found = run(**kind.batch)
        found = found if isinstance(found, torch.Tensor) else found[0]
        assert torch.allclose(found, kind(), atol=1e-10)


# ---------------------------------------------------------------- refusals


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32).double())

    def forward(self, x):
        return x + nn.functional.linear(x, self.weight)


def half_in_code(block, x):
    x = x + block.attn(block.ln_1(x))
    return x + torch.relu(block.ln_2(x)).sin()


def test_what_cannot_be_rewritten_is_refused_in_a_sentence():
    model = nn.Sequential(Bare(), Bare())
    x = states(width=32).double()
    anatomy = survey(model, lambda: model(x))
    branches = find_branches(model, lambda: model(x), anatomy)
    with pytest.raises(EditError, match="what block 0 adds to its stream is not returned by modules"):
        rewrite_residual(model, anatomy, branches, mixed)
    model = PlainGPT(layers=2).double()
    model.h[1].mlp = None
    model.h[1].forward = types.MethodType(half_in_code, model.h[1])
    anatomy = survey(model, lambda: model(tokens()))
    branches = find_branches(model, lambda: model(tokens()), anatomy)
    assert len(branches.found) == 2
    with pytest.raises(EditError, match=r"decoder layer 2 cannot be rewritten: what block h\.1 adds to"):
        rewrite_residual(model, anatomy, branches, mixed)
    assert not edits_in(model)
    rewrite_residual(model, anatomy, branches, mixed, layer=1).undo()
    kind = build("gpt2")
    before = everything(kind.model)
    for where, sentence in (
        ({"layer": 7}, "no branch was found at layer=7"),
        ({"branch": "cross"}, "no branch was found at name='cross'"),
        ({"stack": "encoder"}, "no branch was found at stack='encoder'"),
    ):
        with pytest.raises(EditError, match=sentence):
            rewritten(kind, "gpt2", mixed, **where)
    with pytest.raises(EditError, match="name='mlp' is taken in a GPT2Block"):
        rewritten(kind, "gpt2", Gate(), name="mlp", branch="attention")
    assert not changes(before, everything(kind.model))
    wrapped = nn.DataParallel(kind.model)
    with pytest.raises(EditError, match="parameters cannot be added to a model inside data parallelism"):
        rewrite_residual(wrapped, seen("gpt2"), find_branches(kind.model, kind, seen("gpt2")), Gate())


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda X, F: X[..., :3], r"function returned \(3, 9, 3\) for the addition of attention in h.0; \(3, 9, 32\)"),
        (lambda X, F: (X, F), "function returned tuple for the addition of attention in h.0"),
    ],
)
def test_a_result_that_does_not_fit_is_an_error_in_the_forward(function, sentence):
    kind = build("gpt2")
    with torch.no_grad():
        base = kind()
        with rewritten(kind, "gpt2", function), pytest.raises(EditError, match=sentence):
            kind()
        assert torch.equal(kind(), base)


def test_other_tokens_where_the_model_writes_its_sum_in_place():
    model, x, anatomy = of_ways("into the stream")  # += takes what it is given
    branches = find_branches(model, lambda: model(x), anatomy)
    with torch.no_grad(), rewrite_residual(model, anatomy, branches, halved, layer=2):
        assert model(x).shape == (3, 5, 32)
    model, x, anatomy = of_ways("into the stream, by method")
    branches = find_branches(model, lambda: model(x), anatomy)
    message = "function made another number of tokens in 1, and the block goes on with the tensor that it meant to"
    with rewrite_residual(model, anatomy, branches, halved, layer=2), pytest.raises(EditError, match=message):
        model(x)


def test_an_addition_that_is_not_made_is_an_error_in_the_forward():
    model, x, anatomy = of_ways("operator")
    branches = find_branches(model, lambda: model(x), anatomy)
    with rewrite_residual(model, anatomy, branches, mixed, layer=1):
        model(x)
        model[0].way = "difference"
        with pytest.raises(EditError, match="the addition of mlp in 0 cannot be rewritten: it was not seen in this"):
            model(x)
        model[0].way = "operator"
        model(x)
