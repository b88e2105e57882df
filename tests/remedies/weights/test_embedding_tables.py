"""Tables of embeddings: which are seen in a sum, what size they are given, and what stays."""

import math

import kinds
import pytest
import torch
import transformers as hf
from matrices import rms
from torch import nn

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies.patient import Patient
from fullrank.remedies.weights.embeddings import brought_to_variance, sums, tables
from fullrank.zoo import Transformer, TransformerConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64}
PAIR = {"vocab_size": 64, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
PAIR |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def made(build, *args):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*args).double().eval()


def bart(encoder=2, decoder=2):
    config = hf.BartConfig(**PAIR, encoder_layers=encoder, decoder_layers=decoder, max_position_embeddings=64)
    return made(hf.BartModel, config), TEXT | {"decoder_input_ids": IDS}


def whisper():
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(
        **PAIR, **ends, encoder_layers=2, decoder_layers=2, num_mel_bins=8, max_source_positions=20,
        max_target_positions=20,
    )  # fmt: skip
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)).double()
    return made(hf.WhisperModel, config), {"input_features": features, "decoder_input_ids": IDS}


def deberta():
    config = hf.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)
    return made(hf.DebertaV2Model, config), TEXT


def clip():
    vision = {name: SIZES[name] for name in SIZES if name not in ("vocab_size", "max_position_embeddings")}
    config = hf.CLIPConfig(
        text_config=SIZES | {"eos_token_id": 2}, vision_config=vision | {"image_size": 16, "patch_size": 4}
    )
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return made(hf.CLIPModel, config), TEXT | {"pixel_values": images}


def albert():
    return made(hf.AlbertModel, hf.AlbertConfig(**SIZES, embedding_size=16)), TEXT


def t5():
    kind = kinds.build("t5")
    return kind.model, kind.batch


WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (
            bart,
            {
                "shared.weight": {"encoder", "decoder"},
                "encoder.embed_positions.weight": {"encoder"},
                "decoder.embed_positions.weight": {"decoder"},
            },
        ),
        (deberta, {WORDS: {"encoder"}, POSITIONS: {"encoder"}}),
        (albert, {name: {"encoder"} for name in (WORDS, POSITIONS, "embeddings.token_type_embeddings.weight")}),
        (t5, {"shared.weight": {"encoder", "decoder"}}),
    ],
)
def test_tables_are_those_that_move_a_first_state_whatever_their_width(build, wanted):
    model, batch = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = tables(Patient(model, lambda: model(**batch)))
    assert {one.parameter: set(one.stacks) for one in found} == wanted
    assert len(sums(found)) == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Towers(nn.Module):
    """One stack's last state goes into the first state of the other, with a table of its own."""

    def __init__(self):
        super().__init__()
        config = TransformerConfig(depth=2, width=16, heads=2, vocabulary=20, context=8, positions="none")
        self.first, self.second = (Transformer(config, seed=seed).blocks for seed in (0, 1))
        self.words, self.more = nn.Embedding(20, 16), nn.Embedding(20, 16)

    def forward(self, ids):
        X = self.words(ids)
        for block in self.first:
            X = block(X)
        X = X + self.more(ids)
        for block in self.second:
            X = block(X)
        return X


def test_a_table_is_not_seen_through_the_stack_that_reads_it():
    model = made(Towers)
    batch = {"ids": IDS % 20}
    found = tables(Patient(model, lambda: model(**batch)))
    assert [(one.parameter, len(one.stacks)) for one in found] == [("words.weight", 1), ("more.weight", 1)]
    assert found[0].stacks != found[1].stacks


def first_states(model, batch, *paths):
    """Mean squares of what modules are first called with."""
    found = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: (
                found.setdefault(path, float((args[0] if args else kwargs["hidden_states"]).square().mean())) and None
            ),
            with_kwargs=True,
        )
        for path in paths
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [found[path] for path in paths]


@pytest.mark.parametrize(("name", "count"), [("bert", 3), ("gpt2", 2), ("t5", 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_tables_that_are_summed_have_equal_sizes_that_make_one_variance(name, count, dropout):
    kind = kinds.build(name)
    found = tables(Patient(kind.model, kind))
    assert len(found) == count
    with fullrank.repair(kind.model, "deepscale-init", dropout=dropout, batch=kind.batch):
        for table in found:
            W = kind.model.get_parameter(table.parameter).detach()
            rest = [row for row in range(len(W)) if row != table.padding]
            assert rms(W[rest]) == pytest.approx(((1 - dropout) / count) ** 0.5, rel=1e-12)


def gemma():
    config = hf.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    return made(hf.GemmaModel, config), TEXT | {"use_cache": False}, ("layers.0",)


def granite():
    config = hf.GraniteConfig(**SIZES, num_key_value_heads=4, embedding_multiplier=12.0, pad_token_id=0)
    return made(hf.GraniteModel, config), TEXT | {"use_cache": False}, ("layers.0",)


class Beside(nn.Module):
    """Words, multiplied by 3, on top of a constant vector that is half of the variance."""

    def __init__(self):
        super().__init__()
        config = TransformerConfig(depth=2, width=16, heads=2, vocabulary=20, context=8, positions="none")
        self.words, self.blocks = nn.Embedding(60, 16), Transformer(config, seed=0).blocks
        self.constant = nn.Parameter(0.5**0.5 * torch.tensor([1.0, -1.0]).repeat(8))

    def forward(self, ids):
        X = 3 * self.words(ids) + self.constant
        for block in self.blocks:
            X = block(X)
        return X


def beside():
    return made(Beside), {"ids": IDS}, ("blocks.0",)


@pytest.mark.parametrize("build", [gemma, granite, beside])
@pytest.mark.parametrize("how", ["rescale", "draw"])
def test_where_a_model_multiplies_its_stream_or_adds_to_it_tables_are_scaled_until_it_has_variance_one(build, how):
    model, batch, paths = build()
    with fullrank.repair(model, "deepscale-init", how=how, residual=False, batch=batch) as repair:
        assert first_states(model, batch, *paths) == pytest.approx([1], rel=1e-9)
        assert not any("mean square" in note for note in repair.notes)


def test_each_stack_has_variance_one_with_the_tables_that_it_adds_up():
    for model, batch, paths in (
        (*bart(), ("encoder.layers.0", "decoder.layers.0")),
        (*clip(), ("text_model.encoder.layers.0", "vision_model.encoder.layers.0")),
    ):
        with fullrank.repair(model, "deepscale-init", residual=False, batch=batch):
            assert first_states(model, batch, *paths) == pytest.approx([1, 1], abs=0.25)


def test_what_is_never_in_the_stream_stays():
    model, batch = deberta()
    before = model.encoder.rel_embeddings.weight.detach().clone()
    with fullrank.repair(model, "deepscale-init", residual=False, batch=batch):
        assert torch.equal(model.encoder.rel_embeddings.weight, before)


def test_a_stream_that_tables_cannot_bring_to_one_is_told():
    model, batch = albert()  # a norm and a small map stand behind the sum
    with fullrank.repair(model, "deepscale-init", residual=False, batch=batch) as repair:
        (square,) = first_states(model, batch, "encoder.albert_layer_groups.0")
        assert square < 0.1
        assert any(f"in front of its first block has a mean square of {square:.3g}" in note for note in repair.notes)


def test_a_stream_that_a_multiplier_of_branches_lets_fade_is_told():
    config = hf.GraniteConfig(**SIZES, num_key_value_heads=4, residual_multiplier=0.1, pad_token_id=0)
    model = made(hf.GraniteModel, config)
    with fullrank.repair(model, "deepscale-init", batch=TEXT | {"use_cache": False}) as repair:
        assert any("behind its last block has a mean square of" in note for note in repair.notes)


@pytest.mark.parametrize("remedy", ["deepscale-init", "t-fixup"])
def test_where_no_table_is_seen_a_note_says_so(remedy):
    kind = kinds.build("vit")
    with fullrank.repair(kind.model, remedy, batch=kind.batch) as repair:
        assert any("No table of embeddings was seen in the first state of vision" in note for note in repair.notes)
    with fullrank.repair(kind.model, remedy, embeddings=False, batch=kind.batch) as repair:
        assert not any("No table" in note for note in repair.notes)


def same_place(model, batch, path):
    """Mean cosine of different words at one position, in front of the first block."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    X = nn.functional.normalize(seen[0], dim=-1).transpose(0, 1)
    n = X.shape[1]
    return float(((X @ X.mT).sum((1, 2)) - n).mean() / (n * (n - 1)))


def test_where_words_are_tied_to_the_head_no_table_beside_them_is_raised():
    text = {
        "input_ids": torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    }
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, **ENDS}
    for model, path, names in (
        (made(hf.GPT2LMHeadModel, hf.GPT2Config(**sizes)), "transformer.h.0", ("wte", "wpe")),
        (
            made(hf.BertForMaskedLM, hf.BertConfig(**SIZES)),
            "bert.encoder.layer.0",
            [f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")],
        ),
    ):
        inner = model.get_submodule(path.split(".")[0])
        before = [inner.get_parameter(f"{name}.weight").detach().clone() for name in names]
        cosine = same_place(model, text, path)
        with fullrank.repair(model, "deepscale-init", batch=text) as repair:
            now = [inner.get_parameter(f"{name}.weight") for name in names]
            assert all(map(torch.equal, now, before))
            assert same_place(model, text, path) == pytest.approx(cosine, abs=1e-12)
            assert cosine < 0.8
            assert any("tied to the head, and so" in note for note in repair.notes)


def test_a_table_tied_to_the_head_stays_and_so_does_what_is_added_to_it():
    config = TransformerConfig(depth=2, width=16, heads=2, vocabulary=20, context=8, tie_embeddings=True)
    for positions, tables_ in (("learned", ("words", "positions")), ("none", ("words",))):
        model = Transformer(config.with_(positions=positions), seed=0).double().eval()
        before = [getattr(model.embedding, name).weight.detach().clone() for name in tables_]
        with fullrank.repair(model, "deepscale-init", batch={"input_ids": torch.arange(8)[None]}) as repair:
            now = [getattr(model.embedding, name).weight for name in tables_]
            assert all(map(torch.equal, before, now))
            assert any("embedding.words.weight is tied to the head" in note for note in repair.notes)


def test_frozen_tables_keep_their_direction_where_others_are_drawn():
    model, batch = whisper()
    frozen, learnt = model.encoder.embed_positions.weight, model.decoder.embed_positions.weight
    assert not frozen.requires_grad
    before = [W.detach().clone() for W in (frozen, learnt)]
    with fullrank.repair(model, "deepscale-init", how="draw", batch=batch):
        now = [W.detach() for W in (frozen, learnt)]
        cosines = [float((a * b).sum() / a.norm() / b.norm()) for a, b in zip(before, now, strict=True)]
    assert cosines[0] == pytest.approx(1, abs=1e-12)
    assert abs(cosines[1]) < 0.5


def test_a_frozen_table_of_zeros_stays_and_a_stream_that_is_not_finite_makes_no_nan_of_tables():
    model, batch, _ = beside()
    model.more = nn.Embedding(60, 16, dtype=torch.float64).requires_grad_(False)
    model.more.weight.zero_()
    words, model.words.forward = model.words, lambda ids: words_of(words, model.more, ids)
    with fullrank.repair(model, "deepscale-init", how="draw", residual=False, batch=batch):
        assert not model.more.weight.any()
        assert model.words.weight.isfinite().all()
        assert rms(model.words.weight.detach()) < 0.5
    with torch.no_grad():
        model.constant[0] = math.inf
    group = sums(tables(Patient(model, lambda: model(**batch))))[0]
    with brought_to_variance(Patient(model, lambda: model(**batch)), group, 1.0, "draw", 0):
        assert all(model.get_parameter(one.parameter).isfinite().all() for one in group)


def words_of(words, more, ids):
    return nn.functional.embedding(ids, words.weight) + more(ids)


def test_the_row_of_padding_stays_at_zero():
    model = made(hf.BertModel, hf.BertConfig(**SIZES))
    words = model.embeddings.word_embeddings
    assert words.padding_idx == 0
    for how in ("rescale", "draw"):
        with fullrank.repair(model, "deepscale-init", how=how, batch=TEXT):
            assert not words.weight[0].any()
            assert rms(words.weight[1:].detach()) == pytest.approx(3**-0.5, rel=0.1 if how == "draw" else 1e-12)


def test_tables_take_the_depth_of_the_stack_that_adds_them_up():
    model, batch = bart(encoder=2, decoder=6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with fullrank.repair(model, "t-fixup", batch=batch):
        for name, N in (("encoder.embed_positions", 2), ("decoder.embed_positions", 6), ("shared", 6)):
            name += ".weight"
            torch.testing.assert_close(
                model.get_parameter(name).detach(), (9 * N) ** -0.25 * before[name], rtol=1e-14, atol=0
            )


@pytest.mark.parametrize("remedy", ["deepscale-init", "t-fixup"])
def test_a_table_in_float8_is_refused_and_nothing_changes(remedy):
    model = Coarse().eval()
    with pytest.raises(RemedyError, match=r"words.weight is stored as float8_e4m3fn"):
        fullrank.repair(model, remedy, batch={"ids": IDS % 20})


class Coarse(nn.Module):
    """Words in float8, looked up by bytes."""

    def __init__(self):
        super().__init__()
        config = TransformerConfig(depth=2, width=16, heads=2, vocabulary=20, context=8, positions="none")
        self.blocks = Transformer(config, seed=0).blocks
        self.words = Bytes(20, 16)
        self.words.weight = nn.Parameter(self.words.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, ids):
        X = self.words(ids)
        for block in self.blocks:
            X = block(X)
        return X


class Bytes(nn.Embedding):
    def forward(self, ids):
        return self.weight.view(torch.uint8)[ids].view(torch.float8_e4m3fn).float()
