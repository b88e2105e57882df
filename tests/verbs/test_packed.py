"""Packed rows: the report is that of the documents, one by one; padded rows are no packed ones."""

import functools

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel

import fullrank
from alike import differences
from fullrank.capture.documents import Documents
from fullrank.verbs.batches import as_calls

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


LENGTHS = (40, 25, 33, 1)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "intermediate_size": 32}
GROUPED = SIZES | {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": None}
ACROSS = "attention sees across the packed documents"


@functools.cache
def model(name, implementation="sdpa"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mistral":
            return MistralModel(MistralConfig(**GROUPED, sliding_window=8, attn_implementation=implementation)).eval()
        return LlamaModel(LlamaConfig(**GROUPED, attn_implementation=implementation)).eval()


@functools.cache
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (n,), generator=generator) for n in LENGTHS]


def packed(**more):
    """Two rows: the first two documents and the last two, padded on the right."""
    batch = {"input_ids": torch.zeros(2, 65, dtype=torch.long), "position_ids": torch.zeros(2, 65, dtype=torch.long)}
    for row, pair in enumerate((documents()[:2], documents()[2:])):
        ids, places = torch.cat(pair), torch.cat([torch.arange(len(one)) for one in pair])
        batch["input_ids"][row, : len(ids)], batch["position_ids"][row, : len(ids)] = ids, places
    return batch | more


REAL = torch.arange(65) < torch.tensor([[65], [34]])


def apart():
    """The documents of at least two tokens, one a row."""
    some = [one for one in documents() if len(one) > 1]
    ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(40) < torch.tensor([[len(one)] for one in some])).long()}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_rows_report_what_their_documents_do_one_by_one(name, implementation):
    network = model(name, implementation)
    report = examine(network, packed(), mask=REAL)
    assert not differences(report, examine(network, apart()), tolerance=1e-4, absolute=1e-5)
    assert any("2 rows hold 4 packed documents" in note for note in report.about["notes"])
    assert not any(ACROSS in note for note in report.about["notes"])


@pytest.mark.parametrize("more", [{"use_cache": True}, {"attention_mask": REAL.long()}], ids=["cache", "mask"])
def test_where_the_mask_does_not_keep_documents_apart_attention_is_of_whole_rows_and_that_is_said(more):
    report = examine(model("llama"), packed(**more), mask=REAL, spectrum=False)
    assert any(ACROSS in note for note in report.about["notes"])
    rows = {row.n for row in report.rows.where(site="attention", metric="entropy").rows}
    tokens = {row.n for row in report.rows.where(site="stream", metric="similarity", layer=0).rows}
    assert rows == {2}  # rows
    assert tokens == {3}  # documents of at least two tokens


def test_attention_across_documents_is_read_by_the_mask_of_the_call():
    whole = examine(model("llama"), packed(use_cache=True), mask=REAL, spectrum=False)
    (call,) = as_calls(model("llama"), packed(use_cache=True), REAL)
    with torch.no_grad():
        eager = model("llama", "eager")
        A = eager(**packed(use_cache=True), output_attentions=True).attentions[1].double()
    head = 2
    (row,) = whole.rows.where(metric="effective_keys", layer=2, head=head, scope="late").rows
    expected = []
    for b, length in enumerate((65, 34)):
        late = [t for t in range(length) if 2 * (t + 1) > length]
        expected.append(sum(float(torch.special.entr(A[b, head, t]).sum().exp()) for t in late) / len(late))
    assert row.value == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert call.documents is not None


@pytest.mark.parametrize("fill", [0, 1])
def test_left_padding_with_positions_is_no_packing(fill):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0).masked_fill(mask == 0, fill)
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    (call,) = as_calls(model("llama"), batch)
    assert call.documents is None
    padded = examine(model("llama"), batch, spectrum=False)
    first = examine(model("llama"), {"input_ids": ids[:1, 5:]}, spectrum=False)
    second = examine(model("llama"), {"input_ids": ids[1:]}, spectrum=False)
    for metric in ("similarity", "centered_stable_rank", "residual", "rms"):
        place = {"metric": metric, "layer": 2, "site": "stream", "part": "out", "scope": "late"}
        row, one, two = (report.rows.where(**place).rows[0].value for report in (padded, first, second))
        assert row == pytest.approx((one + two) / 2, rel=1e-4), metric


def test_positions_shared_by_all_rows_and_encoders_are_taken_apart_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BertModel(BertConfig(**SIZES)).eval()
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    report = examine(network, {"input_ids": ids, "position_ids": positions}, spectrum=False)
    (row,) = report.rows.where(metric="similarity", layer=0, scope="all", part="out", site="stream").rows
    assert row.n == 4
    assert any(ACROSS in note for note in report.about["notes"])


def test_of_many_short_documents_beside_a_long_one_the_longest_are_kept_and_that_is_said():
    lengths = [100, *[4] * 25]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = Documents.of(positions, (1, 200), None)
    assert found.count == 26
    assert found._real.shape == (8, 100)  # four times the tokens of the batch
    assert int(found._real.sum(-1).max()) == 100
    assert any("left out" in note for note in found.notes)
