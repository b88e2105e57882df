"""Several variants examined as one report."""

import gc
import weakref

import pytest
import torch
from transformers import BertModel

import fullrank
import tiny
from fullrank.errors import SpecError, TableError
from fullrank.spec import inputs, load
from fullrank.verbs.labels import told_apart

SMALL = "arch:gpt2?n_embd=8&n_head=2&n_positions=32&vocab_size=50&bos_token_id=49&eos_token_id=49&n_layer={}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints and one whose weights are not finite."""
    directory = tmp_path_factory.mktemp("run")
    for step in (500, 1000):
        tiny.save_tokenizer(tiny.save_bert(directory / f"checkpoint-{step}", initializer_range=step / 1e4))
    broken = BertModel(tiny.bert_config())
    with torch.no_grad():
        broken.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    broken.save_pretrained(directory / "checkpoint-1500")
    return directory


@pytest.mark.slow
def test_each_variant_has_the_report_it_has_alone(run):
    specs = [str(run / f"checkpoint-{step}") for step in (500, 1000)]
    together = fullrank.examine_each(specs, spectrum=False)
    assert together.labels == ("checkpoint-500", "checkpoint-1000")
    for spec, report in zip(specs, together.reports, strict=True):
        assert report.rows == fullrank.examine(spec, spectrum=False).rows
    assert together.notes == ()
    assert list(together.table.variant.unique()) == ["checkpoint-500", "checkpoint-1000"]


@pytest.mark.slow
def test_a_variant_that_fails_does_not_lose_the_others(run):
    specs = [str(run / f"checkpoint-{step}") for step in (500, 1500, 1000)]
    found = fullrank.examine_each([*specs, str(run / "checkpoint-2000")], spectrum=False)
    assert found.labels == ("checkpoint-500", "checkpoint-1000")
    assert [one.label for one in found.failed] == ["checkpoint-1500", "checkpoint-2000"]
    assert "'encoder.layer.1.output.dense.weight'" in found.failed[0].reason
    assert "nothing is there" in found.failed[1].reason


def test_where_all_fail_the_first_reason_is_raised(run):
    with pytest.raises(SpecError, match="nothing is there"):
        fullrank.examine_each([str(run / "none"), str(run / "neither")])


def test_a_fault_inside_one_model_is_kept_with_its_name(run):
    def broken():
        raise RuntimeError("out of memory, say")

    found = fullrank.examine_each([broken, str(run / "checkpoint-500")], spectrum=False)
    assert found.failed == (("variant 1", "RuntimeError: out of memory, say"),)


@pytest.mark.slow
def test_one_model_at_a_time_is_in_memory():
    alive, most = [], []

    def made(layers):
        def make():
            gc.collect()
            most.append(sum(one() is not None for one in alive))
            subject = load(SMALL.format(layers))
            alive.append(weakref.ref(subject.model))
            if layers == 2:
                subject.model.h[0].attn.c_attn.weight.data.fill_(float("nan"))
            return subject

        return make

    found = fullrank.examine_each([made(1), made(2), made(3)], labels=["one", "two", "three"], spectrum=False)
    assert most == [0, 0, 0]
    assert found.labels == ("one", "three")


def test_sizes_are_labelled_by_the_option_that_differs():
    found = fullrank.examine_each([SMALL.format(1), SMALL.format(2)], spectrum=False)
    assert found.labels == ("n_layer=1", "n_layer=2")
    assert list(found.pivot("rms", scope="all").columns) == [0, 1, 2]


def test_tokenizers_that_differ_are_said(run, tmp_path):
    other = tiny.save_tokenizer(tiny.save_bert(tmp_path / "other"), words=("the", "sea"))
    found = fullrank.examine_each([str(run / "checkpoint-500"), str(other)], labels=["a", "b"], spectrum=False)
    (note,) = found.notes
    assert "read by b" in note


@pytest.mark.slow
def test_tokenizers_that_differ_are_said_of_several_contexts_too(run, tmp_path):
    specs = [str(run / "checkpoint-500"), str(run / "checkpoint-1000")]
    other = tiny.save_tokenizer(tiny.save_bert(tmp_path / "other"), words=("the", "sea"))
    options = {"labels": ["a", "b", "c"], "spectrum": False, "contexts": [8, 16]}
    found = fullrank.examine_each([*specs, str(other)], **options)
    (note,) = found.notes
    assert "read by c" in note
    alone = fullrank.examine(specs[0], spectrum=False, contexts=[8, 16])
    assert found.reports[0].rows == alone.rows
    assert found.reports[0].context_slopes == alone.context_slopes


def test_a_batch_is_the_same_for_all_even_where_it_can_be_read_once():
    ids = torch.arange(1, 25).reshape(2, 12)
    models = [load(SMALL.format(layers)).model for layers in (1, 2)]
    found = fullrank.examine_each(models, ({"input_ids": one[None]} for one in ids), spectrum=False)
    assert found.labels == ("GPT2Model (1)", "GPT2Model (2)")
    assert {report.about["input"]["sequences"] for report in found.reports} == {2}


@pytest.mark.slow
def test_a_function_makes_the_batch_of_each_subject():
    seen = []

    def batch(subject):
        seen.append(subject.name)
        return inputs(subject, context=9, documents=2)

    found = fullrank.examine_each([SMALL.format(1), SMALL.format(2)], batch, spectrum=False)
    assert seen == [SMALL.format(1), SMALL.format(2)]
    assert {report.about["input"]["tokens"] for report in found.reports} == {18}


def test_progress_rises_from_0_to_1_over_all():
    shares = []
    fullrank.examine_each([SMALL.format(1)] * 2, spectrum=False, progress=lambda what, share: shares.append(share))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], ["a", ""]])
def test_labels_must_be_one_different_name_each(labels):
    with pytest.raises(TableError, match="2 different names"):
        fullrank.examine_each([SMALL.format(1)] * 2, labels=labels)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["run/checkpoint-500", "run/checkpoint-1000"], ["checkpoint-500", "checkpoint-1000"]),
        (["/a/x/last", "/a/y/last"], ["x", "y"]),
        (["bert", "gpt2"], ["bert", "gpt2"]),
        (["org/model@main", "org/model@v2"], ["main", "v2"]),
        (["arch:llama?a=1&b=2", "arch:llama?a=1&b=3"], ["b=2", "b=3"]),
        (["arch:llama?a=1&b=2&c=3", "arch:llama?a=2&b=2&c=4"], ["a=1&c=3", "a=2&c=4"]),
        (["arch:llama", "arch:llama?a=1"], ["arch:llama", "arch:llama&a=1"]),
        (["arch:llama?a=1", "./lost", "arch:llama?a=2"], ["a=1", "lost", "a=2"]),
        (["x/last", "y/last", "z"], ["x/last", "y/last", "z"]),
        (["same", "same"], ["same (1)", "same (2)"]),
        (["a/b", "a/b", "a/c"], ["b (1)", "b (2)", "c"]),
        (["./only"], ["only"]),
    ],
)
def test_labels_are_the_pieces_in_which_names_differ(names, labels):
    assert told_apart(names) == labels
