"""Several contexts in one report: read by position they are what runs on the first tokens alone give."""

import functools

import pytest
import torch
from families_decoders import gemma3n
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, LlamaConfig, LlamaModel, T5Config, T5Model

import fullrank
from alike import differences
from fullrank.errors import BatchError, FullrankError
from fullrank.spec import inputs, load
from fullrank.table import Table
from tiny import save_bert, save_tokenizer

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


CONTEXTS = (16, 33, 72)


def built(kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(config).eval()


def decoder(layers=1, **options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=64, max_position_embeddings=256, initializer_range=0.3,
                         pad_token_id=None, **sizes, **options)  # fmt: skip
    return built(LlamaModel, config)


def encoder():
    config = BertConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=64)
    return built(BertModel, config)


def tokens(*shape, seed=5):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def at(report, context):
    """The rows of one context, their scopes without it, by place; but for the loss, which has a test of its own."""
    suffix = f"+context={context}"
    rows = [row for row in report.rows if row.scope.endswith(suffix) and row.metric != "token_loss"]
    assert rows, f"no rows at {context}"
    return {(*row.key[1:6], row.scope.removesuffix(suffix), row.metric): row for row in rows}


def headlines(report):
    """The rows that a context takes over from a run at its length: late ones where there are any."""
    late = {(row.stack, row.layer, row.site, row.part, row.metric) for row in report.rows if "late" in row.scope}
    return {
        (*row.key[1:6], row.scope, row.metric): row
        for row in report.rows
        if "late" in row.scope or (row.stack, row.layer, row.site, row.part, row.metric) not in late
    }


def same(found, expected, tolerance=1e-5, leaping=()):
    """Row by row, but for metrics that leap where a rounding decides between two neighbours."""
    assert not differences(found, expected, tolerance=tolerance, but=leaping)


def ragged(side, lengths, T):
    batch = {"input_ids": tokens(len(lengths), T), "attention_mask": torch.zeros(len(lengths), T, dtype=torch.long)}
    for row, n in enumerate(lengths):
        batch["attention_mask"][row, slice(T - n, T) if side == "left" else slice(n)] = 1
    return batch


# ------------------------------------------------------------ theorems


@pytest.mark.parametrize("longer", [0, 9], ids=["the longest is a context", "the batch is longer"])
def test_one_pass_read_by_position_equals_runs_on_the_first_tokens_alone(longer):
    """Every attention, token and spectral number, at every context."""
    model, ids = decoder(layers=2), tokens(3, CONTEXTS[-1] + longer)
    report = examine(model, {"input_ids": ids}, contexts=CONTEXTS)
    assert any("read by position in one pass" in note for note in report.about["notes"])
    for context in CONTEXTS:
        alone = examine(model, {"input_ids": ids[:, :context]})
        same(at(report, context), headlines(alone))


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_real_tokens_and_short_sequences_drop_out(side):
    model, lengths = decoder(), (72, 20, 40)
    batch = ragged(side, lengths, 72)
    report = examine(model, batch, contexts=CONTEXTS, spectrum=False)
    for context in CONTEXTS:
        long = [row for row, n in enumerate(lengths) if n >= context]
        real = [batch["input_ids"][row][batch["attention_mask"][row].bool()] for row in long]
        cut = torch.stack([ids[:context] for ids in real])
        alone = examine(model, {"input_ids": cut}, spectrum=False)
        found = at(report, context)
        assert {row.n for row in found.values() if row.metric == "similarity"} == {len(long)}
        # rotations by other angles, as positions begin elsewhere: equal but for rounding
        same(found, headlines(alone), 1e-4, leaping=("neighbourhood_overlap",))


def test_several_batches_are_read_as_one():
    model, ids = decoder(), tokens(4, 40)
    contexts = (16, 33)
    whole = examine(model, {"input_ids": ids}, contexts=contexts, spectrum=False)
    parts = examine(model, [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}], contexts=contexts, spectrum=False)
    for context in contexts:
        same(at(parts, context), at(whole, context))
    for one, other in zip(parts.context_slopes, whole.context_slopes, strict=True):
        assert (one.metric, one.scope, one.n) == (other.metric, other.scope, other.n)
        for ours, theirs in ((one.per_doubling, other.per_doubling), (one.stderr, other.stderr)):
            assert (ours is None) == (theirs is None), one
            assert ours is None or ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), one


def test_a_batch_without_a_long_sequence_leaves_the_others_paired():
    model, ids = decoder(), tokens(3, 40)
    short = {"input_ids": tokens(2, 20, seed=6)}
    report = examine(model, [short, {"input_ids": ids}], contexts=(16, 40), spectrum=False)
    alone = examine(model, {"input_ids": ids}, contexts=(16, 40), spectrum=False)
    same(at(report, 40), at(alone, 40))
    ours, theirs = ({(s.layer, s.head, s.metric, s.scope, s.part, s.site): s for s in r.context_slopes}
                    for r in (report, alone))  # fmt: skip
    for key, slope in theirs.items():
        if slope.stderr is not None:  # of numbers per sequence
            assert ours[key].n == 3
            assert ours[key].per_doubling == pytest.approx(slope.per_doubling, rel=1e-4, abs=1e-5), key


def test_a_bidirectional_model_is_run_at_each_length_on_the_same_sequences_cut():
    model, ids = encoder(), tokens(3, 72)
    report = examine(model, {"input_ids": ids}, contexts=CONTEXTS)
    assert any("run at each length" in note for note in report.about["notes"])
    assert not any("late" in row.scope for row in report.rows)
    for context in CONTEXTS:
        same(at(report, context), headlines(examine(model, {"input_ids": ids[:, :context]})))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_cut_away_where_a_model_is_run_at_each_length(side):
    model, lengths = encoder(), (72, 20, 40)
    batch = ragged(side, lengths, 72)
    report = examine(model, batch, contexts=CONTEXTS, spectrum=False)
    for context in CONTEXTS:
        long = [row for row, n in enumerate(lengths) if n >= context]
        cut = torch.stack([batch["input_ids"][r][batch["attention_mask"][r].bool()][:context] for r in long])
        same(at(report, context), headlines(examine(model, {"input_ids": cut}, spectrum=False)))


def test_an_encoder_decoder_has_rows_of_both_stacks_at_each_length():
    config = T5Config(num_layers=1, num_decoder_layers=1, d_model=16, d_ff=16, num_heads=2, d_kv=8, vocab_size=64)
    model, ids = built(T5Model, config), tokens(2, 40)
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    report = examine(model, batch, contexts=(16, 40), spectrum=False)
    short = {"input_ids": ids[:, :16], "decoder_input_ids": ids.flip(1)[:, :16]}
    same(at(report, 16), headlines(examine(model, short, spectrum=False)))
    assert {row.stack for row in at(report, 40).values()} == {"encoder", "decoder"}
    assert any(row.part == "cross" and row.scope == "all+context=16" for row in report.rows)


def test_of_two_towers_only_the_one_that_is_cut_has_rows_by_context():
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 64, "max_position_embeddings": 64, "eos_token_id": 63, "bos_token_id": 62}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    model = built(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens(2, 32), "pixel_values": pixels}
    report = examine(model, batch, contexts=(16, 32), spectrum=False)
    stacks = {row.stack for row in report.rows}
    moving = {row.stack for row in report.rows if "context=" in row.scope}
    assert "vision" in stacks
    assert moving == stacks - {"vision"}
    assert any(note.startswith("vision: as long at every context") for note in report.about["notes"])


def test_a_decoder_whose_positions_follow_the_length_is_run_at_each_length():
    """Dynamic rotations depend on the longest position: the first tokens of a long run are not those of a short one."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = decoder(rope_parameters=rope)
    model.rotary_emb.max_seq_len_cached = model.rotary_emb.original_max_seq_len = 24
    model.rotary_emb.config.max_position_embeddings = model.config.max_position_embeddings = 24
    ids = tokens(2, 72)
    report = examine(model, {"input_ids": ids}, contexts=(16, 72), spectrum=False)
    notes = " ".join(report.about["notes"])
    assert "the first 16 tokens alone give other states than within 72 tokens" in notes
    assert "run at each length" in notes
    same(at(report, 16), headlines(examine(model, {"input_ids": ids[:, :16]}, spectrum=False)))


# ------------------------------------------------------------ the report


def test_the_numbers_of_the_whole_sequences_stay_as_they_are_and_come_first():
    model, batch = decoder(), {"input_ids": tokens(3, 72)}
    plain = examine(model, batch, spectrum=False)
    report = examine(model, batch, contexts=CONTEXTS, spectrum=False)
    assert Table(row for row in report.rows if "context=" not in row.scope) == plain.rows
    for metric in ("entropy", "similarity"):
        where = {"site": "stream"} if metric == "similarity" else {}
        assert report.pivot(metric, **where).equals(plain.pivot(metric, **where))
        found = report.pivot(metric, scope="late+context=16", **where)
        assert not found.equals(plain.pivot(metric, **where))


def test_texts_cut_shorter_keep_the_special_tokens_that_close_them(tmp_path):
    save_tokenizer(save_bert(tmp_path / "bert"))
    subject = load(str(tmp_path / "bert"))
    report = examine(subject, contexts=(12, 24), spectrum=False)
    short = inputs(subject, context=12)
    assert (short.batches[0]["input_ids"][:, -1] == 3).all()  # [SEP]
    same(at(report, 12), headlines(examine(subject, short, spectrum=False)))
    assert report.about["input"]["tokens"] == 8 * 24


def test_tensors_of_a_plain_encoder_are_cut_along_tokens_wherever_these_stand():
    for batch_first in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
            model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        X = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(1))
        whole, short = (X, X[:, :12]) if batch_first else (X.transpose(0, 1), X[:, :12].transpose(0, 1))
        report = examine(model, whole, contexts=(12, 24), spectrum=False)
        same(at(report, 12), headlines(examine(model, short, spectrum=False)))


@pytest.mark.parametrize(
    ("contexts", "said"),
    [
        ((64,), "two or more"),
        ((), "two or more"),
        ((64, 32), "each larger"),
        ((32, 32), "each larger"),
        ((4, 32), "from 8 on"),
        ((16.5, 32), "whole numbers"),
        ("16,32", "whole numbers"),
        (16, "whole numbers"),
        ((16, 80), "asks for 80 tokens; the longest sequence of the batch has 72"),
    ],
)
def test_contexts_that_cannot_be_read_are_one_sentence(contexts, said):
    with pytest.raises(BatchError, match=said) as error:
        examine(decoder(), {"input_ids": tokens(2, 72)}, contexts=contexts, spectrum=False)
    assert str(error.value).startswith("contexts=")
    assert "\n" not in str(error.value)


def test_a_batch_without_tokens_has_no_contexts():
    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 4, 4)
            self.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in "ab")

        def forward(self, images):
            X = self.patches(images).flatten(2).mT
            for layer in self.layers:
                X = layer(X)
            return X

    with pytest.raises(BatchError, match="contexts= cuts sequences of tokens; this batch holds none"):
        examine(Images().eval(), torch.randn(2, 3, 16, 16), contexts=(8, 16))


def test_a_stack_whose_stream_cannot_be_read_has_no_rows_by_context_and_says_so():
    ids = tokens(3, 32) % 50
    report = fullrank.examine(gemma3n().model.eval(), {"input_ids": ids}, contexts=[8, 32], spectrum=False)
    assert not [row for row in report.rows if "+context=" in row.scope]
    assert any("without rows by context" in note for note in report.about["notes"])


def test_contexts_beyond_learned_positions_are_refused(tmp_path):
    save_tokenizer(save_bert(tmp_path / "bert"))
    with pytest.raises(BatchError, match="learned positions"):
        examine(str(tmp_path / "bert"), contexts=(32, 128))


# ------------------------------------------------------------ chosen heads


def test_spectra_of_chosen_heads_equal_those_of_all_and_nothing_else_is_taken():
    model, batch = decoder(layers=2), {"input_ids": tokens(3, 40)}
    everything = examine(model, batch)
    chosen = examine(model, batch, heads=["decoder.1.3", "2.0", "2.2"])
    spectral = {"attention_s1", "attention_s2", "outlier_share", "attention_stable_rank", "uniform_distance",
                "smoothing_gain", "bulk_excess"}  # fmt: skip
    found = {(row.layer, row.head) for row in chosen.rows if row.metric in spectral}
    assert found == {(1, 3), (2, 0), (2, 2)}
    assert {(one.layer, one.head) for one in chosen.spectra} == found
    theirs = {row.key: row for row in everything.rows}
    for row in chosen.rows:
        if row.value is None:
            assert theirs[row.key].value is None
        else:
            assert row.value == pytest.approx(theirs[row.key].value, rel=5e-3), row.key
    assert len(chosen.rows) == len(everything.rows) - len(spectral) * (8 - 3)


def test_spectra_of_chosen_heads_have_slopes_over_contexts():
    report = examine(decoder(), {"input_ids": tokens(3, 40)}, heads=["1.3"], contexts=(16, 40))
    assert {(s.layer, s.head) for s in report.context_slopes if s.metric == "attention_s2"} == {(1, 3)}


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (["3"], "heads='3' is no head"),
        (["a.b"], "heads='a.b' is no head"),
        (["0.1"], "heads='0.1' is no head"),
        ([], "heads= is empty"),
        (["3.0"], "heads='3.0' is in no stack of this model; it has decoder"),
        (["encoder.1.0"], "heads='encoder.1.0' is in no stack"),
        (["1.4"], "heads='1.4' names head 4; layer 1 of decoder has 4"),
    ],
)
def test_heads_that_are_not_there_are_one_sentence(heads, said):
    with pytest.raises(FullrankError, match=said):
        examine(decoder(), {"input_ids": tokens(2, 24)}, heads=heads)


def test_heads_are_chosen_for_spectra_or_not_at_all():
    with pytest.raises(BatchError, match="spectrum=False"):
        examine(decoder(), {"input_ids": tokens(2, 24)}, heads=["1.0"], spectrum=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_as_many_sequences_as_tokens_are_cut_along_tokens(dtype):
    model, x = encoder(), tokens(24, 24)
    real = torch.ones(24, 24).to(dtype)
    report = examine(model, {"input_ids": x, "attention_mask": real}, contexts=(12, 24), spectrum=False)
    short = {"input_ids": x[:, :12].contiguous(), "attention_mask": real[:, :12]}
    same(at(report, 12), headlines(examine(model, short, spectrum=False)))
