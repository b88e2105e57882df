import json
from importlib import resources

import pytest
import torch

import tiny
from fullrank.errors import BatchError, ContextError
from fullrank.spec import inputs, load
from fullrank.spec.documents import shipped

GPT2 = "arch:gpt2?n_layer=1&n_embd=8&n_head=2&n_positions=64&vocab_size=50&bos_token_id=49&eos_token_id=49"
LLAMA = "arch:llama?num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&vocab_size=50"
T5 = "arch:t5?num_layers=1&num_decoder_layers=1&d_model=8&d_ff=8&num_heads=2&d_kv=4&vocab_size=50"

BART = (
    "arch:bart?encoder_layers=1&decoder_layers=1&d_model=8&encoder_ffn_dim=8&decoder_ffn_dim=8&vocab_size=50"
    "&encoder_attention_heads=2&decoder_attention_heads=2&decoder_start_token_id=7"
)


@pytest.fixture(scope="module")
def reader(bert_master):
    """A BERT of 64 positions, with a tokenizer of whole words."""
    return load(str(bert_master))


@pytest.fixture(scope="module")
def gpt2():
    return load(GPT2)


def refused(says, subject, *, kind=BatchError, **options):
    with pytest.raises(kind, match=says) as caught:
        inputs(subject, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def runs(subject, given):
    with torch.no_grad():
        return [subject.model(**batch) for batch in given.batches]


def jsonl(path, *texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


# ---------------------------------------------------------------- the texts that ship


def test_at_least_eight_texts_ship_all_different_and_long_enough_for_the_default_context():
    documents = shipped(10)
    assert len(documents.texts) == len(set(documents.texts)) == 10
    assert all(len(text.split()) >= 450 for text in documents.texts)
    subject = load_demo()
    given = inputs(subject, documents=10)
    assert given.batches[0]["input_ids"].shape == (10, 512)
    assert bool(given.real[0].all())  # every one of them fills the context


def load_demo():
    from fullrank.spec import demo

    return load(demo())


def test_every_text_is_of_its_own_words():
    """No eight words in a row occur in two of the texts, or twice in one."""
    seen = {}
    for name, text in zip(shipped(10).names, shipped(10).texts, strict=True):
        words = text.lower().split()
        for place in range(len(words) - 7):
            stretch = tuple(words[place : place + 8])
            assert seen.setdefault(stretch, (name, place)) == (name, place)


def test_texts_are_packaged():
    files = [file.name for file in (resources.files("fullrank.spec") / "texts").iterdir()]
    assert sum(name.endswith(".txt") for name in files) >= 8


def test_a_language_model_reads_the_shipped_texts_by_default(reader):
    given = inputs(reader)
    assert given.kind == "text"
    assert (given.sequences, given.tokens) == (8, 8 * 64)
    assert "ship with fullrank" in given.description
    tokens = given.batches[0]["input_ids"]
    assert bool((tokens[:, 0] == 2).all())  # [CLS]
    assert bool((tokens[:, -1] == 3).all())  # [SEP]
    assert tokens.unique(dim=0).shape == tokens.shape
    runs(reader, given)


def test_inputs_are_the_same_every_time(reader, gpt2):
    for subject in (reader, gpt2):
        one, other = inputs(subject, seed=3), inputs(subject, seed=3)
        assert torch.equal(one.batches[0]["input_ids"], other.batches[0]["input_ids"])
    assert not torch.equal(inputs(gpt2, seed=4).batches[0]["input_ids"], inputs(gpt2).batches[0]["input_ids"])


def test_making_inputs_leaves_the_random_state_alone(reader, gpt2):
    state = torch.get_rng_state()
    inputs(reader)
    inputs(gpt2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_context_longer_than_a_document_continues_with_the_next_ones(bert):
    subject = load(str(tiny.edit_config(bert, max_position_embeddings=2000)), init=True)
    given = inputs(subject, context=1500, documents=2)
    tokens = given.batches[0]["input_ids"]
    assert tokens.shape == (2, 1500)
    first, second = (subject.tokenizer.encode(text, add_special_tokens=False) for text in shipped(2).texts)
    assert tokens[0].tolist() == [2, *([*first, *second] * 2)[:1498], 3]
    assert tokens[1].tolist() == [2, *([*second, *first] * 2)[:1498], 3]
    assert "continued with the following ones" in given.description
    assert f"repeated after {len(first) + len(second)} tokens" in given.description


def test_long_sequences_come_one_by_one():
    subject = load(f"{LLAMA}&num_key_value_heads=1")
    assert [len(batch["input_ids"]) for batch in inputs(subject, context=1024).batches] == [8]
    given = inputs(subject, context=1025)
    assert [tuple(batch["input_ids"].shape) for batch in given.batches] == [(1, 1025)] * 8
    assert given.sequences == 8


# ---------------------------------------------------------------- random tokens


def test_without_a_tokenizer_tokens_are_random_and_none_is_special(gpt2):
    given = inputs(gpt2, documents=40)
    tokens = given.batches[0]["input_ids"]
    assert given.kind == "random tokens"
    assert "no tokenizer" in given.description
    assert set(tokens.unique().tolist()) == set(range(49))
    runs(gpt2, given)


def test_text_needs_a_tokenizer(gpt2):
    refused("has no tokenizer", gpt2, text="some words here")


# ---------------------------------------------------------------- text and data


def test_a_text_is_cut_into_consecutive_stretches(reader, tmp_path):
    words = [tiny.WORDS[place % 13] for place in range(40)]
    (tmp_path / "long.txt").write_text(" ".join(words))
    given = inputs(reader, text=tmp_path / "long.txt", context=12)
    ids = reader.tokenizer.encode(" ".join(words), add_special_tokens=False)
    assert [row[1:-1] for row in given.batches[0]["input_ids"].tolist()] == [ids[k : k + 10] for k in (0, 10, 20, 30)]
    assert "consecutive stretches" in given.description
    assert inputs(reader, text=tmp_path / "long.txt", context=12, documents=2).sequences == 2


def test_a_short_rest_of_a_text_is_left_out_and_a_long_one_padded(reader):
    assert inputs(reader, text=" ".join(["tide"] * 24), context=12).sequences == 2
    given = inputs(reader, text=" ".join(["tide"] * 26), context=12)
    assert given.real[0].sum(1).tolist() == [12, 12, 8]


def test_a_string_of_several_words_is_the_text_itself(reader):
    given = inputs(reader, text="the tide and the moon")
    assert given.batches[0]["input_ids"].tolist() == [[2, *reader.tokenizer.encode("the tide and the moon")[1:-1], 3]]


def test_documents_of_different_lengths_are_padded_on_the_right(reader, tmp_path):
    given = inputs(reader, data=jsonl(tmp_path / "d.jsonl", "the tide", "moon and sea and water", "a"))
    assert given.real[0].sum(1).tolist() == [4, 7, 3]
    assert torch.equal(given.batches[0]["attention_mask"].bool(), given.real[0])
    assert bool((given.batches[0]["input_ids"][~given.real[0]] == 0).all())
    assert given.tokens == 14
    assert "3 documents" in given.description
    assert "3 to 7 tokens" in given.description
    runs(reader, given)


def test_padding_needs_no_pad_token(bert, tmp_path):
    for file in bert.glob("token*"):
        file.unlink()
    subject = load(str(tiny.save_tokenizer(bert, special=False)))
    given = inputs(subject, data=jsonl(tmp_path / "d.jsonl", "the tide", "the moon and the sea"))
    assert given.batches[0]["input_ids"].shape == (2, 5)
    assert int(given.batches[0]["input_ids"].max()) < subject.vocabulary
    runs(subject, given)


def test_only_so_many_documents_are_taken(reader, tmp_path):
    file = jsonl(tmp_path / "d.jsonl", *["the tide"] * 12)
    assert inputs(reader, data=file).sequences == 8
    assert inputs(reader, data=file, documents=11).sequences == 11


# ---------------------------------------------------------------- encoder-decoders


@pytest.mark.parametrize(("spec", "start"), [(T5, 0), (BART, 7)])
def test_the_decoder_reads_the_same_document_one_step_late(spec, start):
    subject = load(spec)
    given = inputs(subject, context=16, documents=3)
    batch = given.batches[0]
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert bool((batch["decoder_input_ids"][:, 0] == start).all())
    assert torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])
    runs(subject, given)


# ---------------------------------------------------------------- what cannot be read


def test_a_context_beyond_learned_positions_is_refused(gpt2):
    said = refused("context=65536, but this gpt2 has 64 learned positions", gpt2, kind=ContextError, context=65536)
    assert "use context<=64" in said


def test_a_context_beyond_configured_rotary_positions_is_told_not_refused():
    subject = load(f"{LLAMA}&num_key_value_heads=1&max_position_embeddings=16")
    given = inputs(subject, context=20, documents=2)
    assert "beyond the 16 positions" in given.description
    assert inputs(subject).batches[0]["input_ids"].shape[1] == 16


@pytest.mark.parametrize("context", [1, 0, -5])
def test_one_token_is_nothing_to_compare(gpt2, context):
    refused("one token", gpt2, kind=ContextError, context=context)


def test_special_tokens_must_leave_room(reader):
    refused("no room for text: this tokenizer adds 2", reader, kind=ContextError, context=2)


@pytest.mark.parametrize("documents", [0, -1])
def test_no_documents_are_refused(gpt2, documents):
    refused(f"documents={documents}; at least one", gpt2, documents=documents)


def test_more_documents_than_ship_are_refused(reader):
    refused("documents=100, but", reader, documents=100)


@pytest.mark.parametrize("content", ["", "  \n\n"])
def test_an_empty_text_is_refused(reader, tmp_path, content):
    (tmp_path / "e.txt").write_text(content)
    refused("is empty", reader, text=tmp_path / "e.txt")
    refused("is empty", reader, text=content)


def test_unreadable_files_are_named(reader, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00tide")
    for option in ("text", "data"):
        refused(f"{option}=.*nowhere.* cannot be read: No such file", reader, **{option: tmp_path / "nowhere"})
        refused(f"{option}=.* cannot be read: Is a directory", reader, **{option: tmp_path})
        refused("is not UTF-8", reader, **{option: tmp_path / "bytes.txt"})
    refused("cannot be read", reader, text="nowhere.txt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no lines"),
        ("\n\n", "has no lines"),
        ('{"text": "the tide"}\n\n{"body": 3}', r"line 3 has the fields \['body'\]"),
        ('{"text": "the tide"}\nthe moon', "line 2 is not JSON"),
        ('{"text": 3}', "line 1 has a field 'text' that is no string"),
        ("[1]", "line 1 is a list"),
        ('{"text": " "}', "line 1 has an empty field 'text'"),
    ],
)
def test_lines_without_a_text_are_named_by_number(reader, tmp_path, content, says):
    (tmp_path / "d.jsonl").write_text(content)
    refused(says, reader, data=tmp_path / "d.jsonl")


def test_a_document_of_one_token_is_refused(bert, tmp_path):
    for file in bert.glob("token*"):
        file.unlink()
    subject = load(str(tiny.save_tokenizer(bert, special=False)))
    refused("line 2 gives one token", subject, data=jsonl(tmp_path / "d.jsonl", "the tide", "moon"))
    refused("cannot be read", subject, text="moon")
    (tmp_path / "one.txt").write_text("moon\n")
    refused("gives one token", subject, text=tmp_path / "one.txt")


def test_a_tokenizer_of_another_model_is_told(bert):
    subject = load(str(tiny.edit_config(bert, vocab_size=10)), init=True)
    refused("do not belong together", subject, text="the tide and the moon and the sea and the bread and the hive")


def test_one_source_at_a_time_and_of_the_right_sort(reader, tmp_path):
    refused("text= and data= were both given", reader, text="the tide", data=tmp_path / "d.jsonl")
    refused("reads text input; it takes text= or data=", reader, images="picture.png")
