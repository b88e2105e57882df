"""Rows of a reference at initialisation stand beside those of the model, and are its own law's."""

import math
import warnings
from statistics import mean, stdev

import peft
import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

import fullrank
import fullrank.capture
from fullrank.diagnosis.initialisation import reinitialised
from fullrank.verbs.batches import as_calls
from fullrank.verbs.passes import anatomy_of
from fullrank.verbs.ranks import Ranks
from fullrank.verbs.referenced import reference_rows
from untouched import changes, everything

CHOSEN = (
    *("bert", "roberta", "vit", "swin", "gpt2", "llama", "qwen2", "gemma", "olmo3", "gpt_neox", "t5", "bart", "clip"),
    *("mixtral", "torch_pair", "plain_code"),
)
IDS = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(0))


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def lm():
    config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**config)).eval())


def referenced(model, batch, *, seed=1, mask=None, **options):
    """As `examine` would call it."""
    calls = as_calls(model, batch, mask)
    with fullrank.capture.undisturbed(model):
        anatomy = anatomy_of(model, calls, Ranks())
    return reference_rows(reinitialised(model, seed=seed).model, calls, anatomy, **options)


def by_place(rows):
    return {row.key[1:]: (row.value, row.stderr, row.n, row.exact, row.note) for row in rows}


@pytest.mark.parametrize(
    "family", [one if one in ("gpt2", "t5", "vit") else pytest.param(one, marks=pytest.mark.slow) for one in CHOSEN]
)
def test_rows_of_a_reference_are_those_of_examining_it(family):
    case = seeded(FAMILIES[family])
    case.model.eval()
    before = everything(case.model)
    options = {"gradients": True, "probes": 2, "weights": True, "seed": 3}
    rows, notes = referenced(case.model, case.batch, **options, like=case.model)
    assert not changes(before, everything(case.model))
    twin = reinitialised(case.model, seed=3).model
    report = fullrank.examine(twin, case.batch, spectrum=False, reference=False, gradients=True, probes=2, weights=True)
    assert rows
    assert {row.source for row in rows} == {"initialisation"}
    assert by_place(rows) == by_place(report.rows)
    assert {note.removeprefix("at initialisation: ") for note in notes} <= set(report.about["notes"])


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return seeded(lambda: BertModel(BertConfig(**sizes, vocab_size=50), add_pooling_layer=False).eval())


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return seeded(lambda: T5Model(T5Config(**sizes, vocab_size=50)).eval())


@pytest.mark.parametrize("make", [lm, bert, t5])
def test_a_reference_is_read_at_the_contexts_of_the_model(make):
    """By position where attention is causal, cut elsewhere: what examining the twin at these contexts gives."""
    model = make()
    batch = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if make is t5 else {})
    report = fullrank.examine(model, batch, contexts=(8, 12), spectrum=False, seed=5)
    twin = reinitialised(model, seed=5 + 7919).model  # another seed than the model's, whatever that is
    expected = fullrank.examine(twin, batch, contexts=(8, 12), spectrum=False, reference=False)
    found = by_place(report.reference.rows)
    assert found == by_place(row for row in expected.rows if row.metric != "token_loss")
    assert {row.key[1:] for row in report.rows if row.metric != "token_loss"} == set(found)
    for context in (8, 12):
        of_attention = [key for key in found if key[5].endswith(f"+context={context}") and key[6] == "contrast_gain"]
        assert of_attention
        assert all(found[key][0] is not None for key in of_attention)
    assert not [note for note in report.about["notes"] if note.startswith("at initialisation: ")]


def test_what_was_not_asked_for_is_not_there():
    rows, _ = referenced(lm(), IDS)
    assert {row.site for row in rows} == {"stream", "read", "attention"}
    assert not {"gradient_rms", "head_similarity", "attention_s1"} & {row.metric for row in rows}
    assert {"token_energy", "normalized_entropy", "sink_mass"} <= {row.metric for row in rows}


def test_every_row_of_a_model_has_its_counterpart():
    model = lm()
    rows, _ = referenced(model, IDS, gradients=True, weights=True)
    report = fullrank.examine(model, IDS, spectrum=False, gradients=True, weights=True)
    assert {row.key[1:] for row in rows} == {row.key[1:] for row in report.rows}


def test_the_labels_of_the_batch_are_used_as_they_are():
    model = lm()
    rows, _ = referenced(model, {"input_ids": IDS, "labels": IDS}, gradients=True)
    gradients = [row for row in rows if row.metric == "gradient_rms"]
    assert gradients
    assert all(row.exact and row.value for row in gradients)  # of a loss, and not of random projections
    twin = reinitialised(model, seed=1).model
    twin(input_ids=IDS, labels=IDS).loss.backward()
    norm = next(row for row in rows if row.metric == "gradient_norm" and row.part == "transformer.wpe.weight")
    assert norm.value == pytest.approx(float(twin.transformer.wpe.weight.grad.norm()), rel=1e-4)


def test_padding_is_left_out_as_of_the_model():
    mask = (torch.arange(12) < torch.tensor([[12], [12], [12], [7]])).long()
    rows, _ = referenced(lm(), {"input_ids": IDS, "attention_mask": mask})
    other = torch.where(mask.bool(), IDS, 49 - IDS)
    agree(rows, referenced(lm(), {"input_ids": other, "attention_mask": mask})[0])


def test_several_batches_are_one():
    agree(referenced(lm(), IDS)[0], referenced(lm(), [IDS[:1], IDS[1:]])[0])


def agree(rows, others):
    mine, theirs = by_place(rows), by_place(others)
    assert mine.keys() == theirs.keys()
    for key, (value, _, n, *_) in mine.items():
        assert theirs[key][2] == n
        assert theirs[key][0] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), key


MODELS = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=3, n_head=2, vocab_size=99, n_positions=64)), 99),
    "llama": (
        lambda: LlamaModel(
            LlamaConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, vocab_size=99
            )
        ),
        99,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_model_is_a_draw_like_its_references(name):
    make, words = MODELS[name]
    model = seeded(lambda: make().eval())
    ids = torch.randint(words, (6, 32), generator=torch.Generator().manual_seed(4))
    report = fullrank.examine(model, ids, spectrum=False)
    drawn = [by_place(referenced(model, ids, seed=seed)[0]) for seed in range(1, 7)]
    looked = 0
    for row in report.rows:
        if row.metric in ("shared_energy", "sequence_energy", "token_energy", "normalized_entropy") and row.value:
            values = [one[row.key[1:]][0] for one in drawn]
            # seven draws of the weights, one of them the model's, each on the same six sequences
            error = math.hypot(stdev(values) * math.sqrt(1 + 1 / len(values)), row.stderr or 0)
            assert abs(row.value - mean(values)) <= 6 * error + 1e-6, row
            looked += 1
    assert looked > 30


def test_a_trained_model_is_no_such_draw():
    model = seeded(lambda: MODELS["gpt2"][0]().eval())
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(20)
    ids = torch.randint(99, (6, 32), generator=torch.Generator().manual_seed(4))
    report = fullrank.examine(model, ids, spectrum=False)
    initial = by_place(referenced(model, ids)[0])
    entropies = [row for row in report.rows if row.metric == "normalized_entropy" and row.value]
    assert min(row.value / initial[row.key[1:]][0] for row in entropies) < 0.8


def test_a_reference_that_overflows_is_a_sentence():
    model = lm().half()
    twin = reinitialised(model, seed=1).model
    with torch.no_grad():
        for branch in (twin.transformer.h[1].attn, twin.transformer.h[1].mlp):
            branch.c_proj.bias.fill_(60000)  # twice that is more than float16 holds
    calls = as_calls(model, IDS)
    with fullrank.capture.undisturbed(model):
        anatomy = anatomy_of(model, calls, Ranks())
    rows, notes = reference_rows(twin, calls, anatomy)
    assert rows == []
    assert len(notes) == 1
    assert notes[0].startswith("no reference at initialisation: the activations are not finite: ")


def test_a_reference_of_another_depth_is_refused():
    model, other = lm(), seeded(lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=50)))
    calls = as_calls(model, IDS)
    with fullrank.capture.undisturbed(model):
        anatomy = anatomy_of(model, calls, Ranks())
    rows, notes = reference_rows(other.eval(), calls, anatomy)
    assert rows == []
    assert notes == ["no reference at initialisation: its decoder has other blocks than the model's (3 and not 2)."]
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4))
    rows, notes = reference_rows(vit.eval(), as_calls(vit, {"pixel_values": torch.randn(2, 3, 8, 8)}), anatomy)
    assert rows == []
    assert notes == ["no reference at initialisation: it has other stacks than the model (vision and not decoder)."]


def test_the_twin_is_left_as_it_was():
    model = lm()
    twin = reinitialised(model, seed=1).model
    twin.train()
    calls = as_calls(model, IDS)
    with fullrank.capture.undisturbed(model):
        anatomy = anatomy_of(model, calls, Ranks())
    before = everything(twin)
    assert reference_rows(twin, calls, anatomy, gradients=True, weights=True)[0]
    assert not changes(before, everything(twin))


def test_no_twin_no_rows():
    assert reference_rows(None, as_calls(lm(), IDS), None) == ([], [])


class OneOfTwo(Ranks):
    """Of two processes the other could not make a twin."""

    several = True

    def gathered(self, value):
        return [value, False]


def test_processes_have_rows_together_or_not_at_all():
    model = lm()
    twin = reinitialised(model, seed=1).model
    assert reference_rows(twin, as_calls(model, IDS), None, ranks=OneOfTwo()) == ([], [])


def test_progress_says_what_is_run():
    heard = []
    referenced(lm(), IDS, tell=lambda what, share: heard.append((what, share)))
    assert heard[0] == ("at initialisation: finding the blocks", 0.0)
    assert heard[-1] == ("at initialisation: decoder layer 2 of 2", 1.0)


def test_batch_norms_use_the_statistics_of_the_batch_where_the_model_does():
    body = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(4)))
    X = 3 + torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    running, notes = referenced(body.eval(), X)
    assert any(note.startswith("at initialisation: no batch norm of this model has seen a batch") for note in notes)
    batch, _ = referenced(body.eval(), X, batch_statistics=True)
    assert by_place(running).keys() == by_place(batch).keys()
    assert by_place(running) != by_place(batch)


def test_sentences_that_were_said_of_the_model_are_not_repeated():
    case = seeded(FAMILIES["fnet"])
    case.model.eval()
    _, notes = referenced(case.model, case.batch)
    assert notes
    assert all(note.startswith("at initialisation: ") for note in notes)
    known = [note.removeprefix("at initialisation: ") for note in notes]
    assert referenced(case.model, case.batch, known=known)[1] == []


def test_rows_of_an_adapted_model_stand_beside_those_of_its_base_architecture():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks models for what they call otherwise now
        model = peft.get_peft_model(base, config).eval()
    rows, notes = referenced(model, {"input_ids": IDS})
    assert not [note for note in notes if "no reference" in note]
    report = fullrank.examine(model, {"input_ids": IDS}, spectrum=False)
    assert {row.key[1:] for row in rows} == {row.key[1:] for row in report.rows}
