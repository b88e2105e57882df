"""examine draws a reference and diagnoses: end to end on tiny models."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import fullrank
from fullrank.errors import BatchError
from fullrank.report import Report
from fullrank.report.verdict import Severity
from fullrank.spec import Subject
from fullrank.verbs.ranks import Ranks
from untouched import changes, everything

LAYERS = 3
CONFIG = {"n_layer": LAYERS, "n_head": 2, "n_embd": 32, "vocab_size": 50, "n_positions": 32}
ENDS = {"bos_token_id": 49, "eos_token_id": 49}


def gpt2(kind=GPT2Model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(GPT2Config(**CONFIG, **ENDS)).eval()


def trained(kind=GPT2Model):
    """As training leaves a model: every tensor away from its start, blocks that write."""
    model = gpt2(kind)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def with_a_dead_block(kind=GPT2Model):
    model = trained(kind)
    block = model.base_model.h[1] if kind is not GPT2Model else model.h[1]
    with torch.no_grad():
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            linear.weight.zero_()
            linear.bias.zero_()
    return model


def batch(*, labels=False, sequences=4):
    ids = torch.randint(49, (sequences, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids} if labels else {"input_ids": ids}


def examined(model, given=None, **options):
    return fullrank.examine(model, given or batch(), spectrum=False, **options)


@functools.cache
def of_fresh():
    return examined(gpt2())


# ---------------------------------------------------------------- references


def test_the_same_places_are_measured_at_initialisation_and_stay_apart_from_the_models():
    report = of_fresh()
    assert {row.source for row in report.rows} == {"measured"}
    assert {row.source for row in report.reference.rows} == {"initialisation"}
    here, there = ({row.key[1:] for row in one.rows} for one in (report, report.reference))
    assert here == there
    assert "GPT2Model built anew from its configuration" in report.diagnosis.reference


def test_the_reference_is_another_draw_of_the_same_law():
    ratios = of_fresh().ratios
    rms = ratios[(ratios.metric == "rms") & (ratios.site == "stream") & (ratios.layer > 0)].to_initialisation
    assert len(rms) >= LAYERS
    assert rms.between(0.8, 1.25).all()
    assert not rms.eq(1.0).any()


def test_without_a_reference_that_is_said_and_the_diagnosis_stays():
    report = examined(gpt2(), reference=False)
    assert report.reference is None
    assert report.diagnosis.reference == "no reference: none was asked for (reference=False, --no-reference)."
    assert report.rows == of_fresh().rows
    assert len(report.diagnosis.clear) + len(report.diagnosis.unchecked) > 0


@pytest.mark.parametrize(("seconds", "there"), [(1e-4, False), (1000.0, True)])
def test_a_time_budget_that_leaves_no_room_draws_none_and_says_so(seconds, there):
    report = examined(gpt2(), seconds=seconds)
    assert (report.reference is not None) is there
    assert (report.diagnosis.reference == "no reference: the time budget leaves no room for it.") is not there


def test_a_model_that_cannot_be_made_again_is_diagnosed_without_and_its_reason_is_told():
    class Scaled(nn.Module):
        """Nothing says how its parameter is drawn."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 32))

        def forward(self, x):
            return x * self.scale

    class Own(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(50, 32), nn.ModuleList(blocks)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = x + block(x)
            return x

    report = examined(Own([nn.Sequential(nn.Linear(32, 32), Scaled()) for _ in range(2)]), blocks="blocks")
    assert report.reference is None
    assert "'scale'" in report.diagnosis.reference
    assert report.diagnosis.weights == "unknown"
    assert report.diagnosis.clear


# ---------------------------------------------------------------- trained or fresh


def test_fresh_weights_look_fresh_and_trained_ones_trained():
    assert of_fresh().diagnosis.weights == "fresh"
    assert examined(trained()).diagnosis.weights == "trained"
    assert examined(trained(), reference=False).diagnosis.weights == "unknown"


@pytest.mark.parametrize(("fresh", "said"), [(True, "fresh"), (False, "trained")])
def test_who_loaded_the_model_knows_and_is_believed(fresh, said):
    diagnosis = examined(Subject(gpt2(), "mine", "", fresh), reference=False).diagnosis
    assert diagnosis.weights == said
    names = {one.name for one in diagnosis.unchecked if "trained weights only" in one.words}
    assert ("dead-depth" in names) is fresh


# ---------------------------------------------------------------- tests by intervention


def test_a_dead_block_is_a_note_without_a_test_and_more_with_one():
    subject = Subject(with_a_dead_block(), "./mine", "", False)
    noted = examined(subject)
    (verdict,) = [one for one in noted.verdicts if one.name == "dead-depth"]
    assert (verdict.severity, verdict.layers, verdict.effects) == (Severity.NOTE, (2,), ())
    assert verdict.command == "fullrank examine ./mine --verify"
    assert noted.diagnosis.outcome == ""
    tested = examined(subject, verify=True)
    (verdict,) = [one for one in tested.verdicts if one.name == "dead-depth"]
    assert verdict.severity in (Severity.WARN, Severity.FAIL)
    assert verdict.layers == (2,)
    assert all(effect.change == pytest.approx(0, abs=1e-9) for effect in verdict.effects)
    assert verdict.command == "fullrank explain dead-depth"
    assert "final state" in tested.diagnosis.outcome


def test_effects_are_of_the_models_own_loss_where_it_has_one():
    subject = Subject(with_a_dead_block(GPT2LMHeadModel), "./mine", "", False)
    report = examined(subject, batch(labels=True), verify=True)
    (verdict,) = [one for one in report.verdicts if one.name == "dead-depth"]
    assert {effect.outcome for effect in verdict.effects} == {"loss"}
    with torch.no_grad():
        loss = float(subject.model(**batch(labels=True)).loss)
    assert verdict.effects[0].baseline == pytest.approx(loss, rel=1e-3)
    assert {effect.n for effect in verdict.effects} == {4}


@pytest.mark.parametrize("kind", [GPT2Model, GPT2LMHeadModel])
def test_testing_leaves_the_model_bit_for_bit_as_it_was(kind):
    model = with_a_dead_block(kind).train()
    output = model(**batch())[0]
    output.square().sum().backward()  # gradients that must stay
    before = everything(model)
    report = examined(Subject(model, "mine", "", False), batch(labels=kind is GPT2LMHeadModel), verify=True)
    assert any(verdict.effects for verdict in report.verdicts)
    assert not changes(before, everything(model))


def test_testing_changes_no_number():
    subject = Subject(with_a_dead_block(), "mine", "", False)
    assert examined(subject, verify=True).rows == examined(subject).rows


def test_packed_rows_and_caches_are_refused_before_anything_is_measured(monkeypatch):
    ids = batch()["input_ids"]
    packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(10), torch.arange(6)]).expand(4, -1)}
    model = gpt2()
    assert examined(model, packed).diagnosis is not None
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
    monkeypatch.setattr("fullrank.verbs.examine.record", lambda *_: pytest.fail("it was measured"))
    for refused in (packed, {"input_ids": ids[:, 8:], "past_key_values": cache}):
        with pytest.raises(BatchError, match=r"^verify= goes with whole sequences.*\.$"):
            examined(model, refused, verify=True)


@pytest.fixture
def two_processes(monkeypatch):
    """One process that is told it is one of several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr("fullrank.verbs.examine.ranks_of", lambda _: Ranks(dist.group.WORLD))
    yield
    dist.destroy_process_group()


def test_a_distributed_model_is_not_tested_and_has_no_reference(two_processes):
    with pytest.raises(BatchError, match="verify= goes with one process: this model is distributed"):
        examined(gpt2(), verify=True)
    report = examined(gpt2())
    assert report.diagnosis.reference == "no reference: the model is distributed."
    assert report.rows == of_fresh().rows


# ---------------------------------------------------------------- the beginning of a sequence


class Tokenizer:
    """Stands in for one: puts its token in front of every text, or has it without using it."""

    def __init__(self, token, *, in_front):
        self.bos_token_id, self.in_front = token, in_front

    def __call__(self, text):
        front = [self.bos_token_id] if self.in_front and self.bos_token_id is not None else []
        return {"input_ids": [*front, 3]}


@pytest.fixture
def bos(monkeypatch):
    """What the evidence says of the beginning."""
    from fullrank.verbs import diagnosed

    seen = []
    original = diagnosed.diagnose

    def diagnose(evidence, *arguments, **options):
        seen.append(evidence.bos)
        return original(evidence, *arguments, **options)

    monkeypatch.setattr(diagnosed, "diagnose", diagnose)

    def of(ids, token, *, in_front=True, **more):
        tokenizer = None if token is None else Tokenizer(token if token >= 0 else None, in_front=in_front)
        subject = Subject(gpt2(), "mine", "", False, tokenizer=tokenizer)
        examined(subject, {"input_ids": ids, **more}, reference=False)
        return seen.pop()

    return of


def test_the_batch_begins_with_the_tokenizers_token_or_not(bos):
    ids = batch()["input_ids"]
    with_it = ids.clone()
    with_it[:, 0] = 49
    assert bos(with_it, 49) is True
    assert bos(ids, 49) is False
    one_without = with_it.clone()
    one_without[2, 0] = 3
    assert bos(one_without, 49) is False


def test_a_token_that_the_tokenizer_never_puts_in_front_is_not_missing(bos):
    assert bos(batch()["input_ids"], 49, in_front=False) is None


@pytest.mark.parametrize("token", [None, -1])
def test_nobody_knows_without_a_tokenizer_or_a_token(bos, token):
    assert bos(batch()["input_ids"], token) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_beginning_is_that_of_the_real_tokens(bos, side):
    ids = batch()["input_ids"].clone()
    mask = torch.ones_like(ids)
    padding, first = (slice(0, 4), 4) if side == "left" else (slice(12, 16), 0)
    mask[:, padding] = 0
    ids[:, padding] = 7
    assert bos(ids, 49, attention_mask=mask) is False
    ids[:, first] = 49
    assert bos(ids, 49, attention_mask=mask) is True


# ---------------------------------------------------------------- several models, files


def test_examine_each_hands_the_options_on():
    subjects = [Subject(with_a_dead_block(), "a", "", False), Subject(trained(), "b", "", False)]
    found = fullrank.examine_each(subjects, batch(), spectrum=False, verify=True, reference=False)
    assert [report.reference for report in found.reports] == [None, None]
    assert all(report.diagnosis.outcome for report in found.reports)
    dead = [[verdict.layers for verdict in report.verdicts if verdict.name == "dead-depth"] for report in found.reports]
    assert dead == [[(2,)], []]


def test_verdicts_survive_a_file_and_stand_on_the_page(tmp_path):
    report = examined(Subject(with_a_dead_block(), "mine", "", False), verify=True)
    assert Report.load(report.save_json(tmp_path / "report.json")) == report
    html = report.to_html()
    for verdict in report.verdicts:
        assert verdict.name in html


@pytest.mark.parametrize(("own", "named"), [("eager", "softmax"), ("sdpa", "scaled_dot_product_attention")])
def test_the_report_says_on_which_kernels_the_model_ran_and_that_they_are_its_own(own, named):
    model = gpt2()
    model.set_attn_implementation(own)
    report = examined(model, reference=False)
    assert [stack["kernel"] for stack in report.about["stacks"]] == [named]
    assert report.about["kernels"] == "untouched"
    assert model.config._attn_implementation == own


def test_a_model_without_attention_names_no_kernel():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    report = examined(model, (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),), reference=False)
    assert [stack["kernel"] for stack in report.about["stacks"]] == [""]
