"""An effect is the mean over documents of what an intervention changes, with its interval; and it leaves no trace."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers as hf
from family import ENDS, ids
from patients import RIGHT, SMALL, Patient, Ward, admit, anatomy
from plain import PlainGPT
from scipy import stats
from torch import Tensor, nn

from fullrank.capture import survey
from fullrank.capture.weights import per_head
from fullrank.diagnosis import Evidence, Failure, Looked, Suspicion, Test, diagnose
from fullrank.diagnosis.effects import Trials, paired
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.merging import Merging
from fullrank.diagnosis.thresholds import effect_limits
from fullrank.report.verdict import Effect, Severity
from fullrank.verbs.batches import as_calls
from untouched import changes, everything

SKIP = Intervention("skip-block", "decoder", 2)


def plain_trials(**options) -> tuple[nn.Module, Trials, list[int]]:
    patient, forwards = admit("plain"), []
    trials = Trials(patient.model, anatomy("plain"), [Ward(patient.batch, forwards=forwards)], **options)
    return patient.model, trials, forwards


def skipping(patient: Patient, layer: int):
    def hands_on(module, args, kwargs, output):
        stream = args[0] if args else kwargs["hidden_states"]
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    return patient.block(layer).register_forward_hook(hands_on, with_kwargs=True)


def interval(values: list[float]) -> tuple[float, float, float]:
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(np.mean(values)), float(found.low), float(found.high)


def numbers(effect: Effect | str) -> tuple[float, float, float]:
    assert isinstance(effect, Effect), effect
    return effect.change, effect.low, effect.high


def test_the_interval_is_that_of_students_t():
    values = [0.3, -0.1, 0.25, 0.8, 0.4]
    assert paired(values) == pytest.approx(interval(values))
    assert paired([0.5, 0.5]) == (0.5, 0.5, 0.5)


class TestLoss:
    def language_model(self) -> Patient:
        config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=64, **ENDS)
        return Patient(hf.GPT2LMHeadModel(config), {"input_ids": ids(4)}, "transformer.h", "decoder")

    def test_it_is_the_difference_of_each_documents_own_loss(self):
        patient = admit(self.language_model)
        labels = ids(4)
        labels[0, 5:], labels[2, 7:] = -100, -100  # documents of other lengths
        batch = {"input_ids": ids(4), "labels": labels}

        def losses() -> list[float]:
            found = []
            for b in range(4):
                logits = patient.model(input_ids=ids(4)[b : b + 1], use_cache=False).logits[0]
                terms = [
                    -math.log(math.exp(logits[t, y]) / sum(math.exp(x) for x in logits[t]))
                    for t, y in enumerate(labels[b, 1:].tolist())
                    if y >= 0
                ]
                found.append(sum(terms) / len(terms))
            return found

        with torch.no_grad():
            before = losses()
            hook = skipping(patient, 2)
            after = losses()
            hook.remove()
        trials = Trials(patient.model, patient.anatomy(), as_calls(patient.model, batch))
        effect = trials.effect(SKIP)
        assert trials.outcome == "loss"
        assert trials.words == "the model's own loss, over 4 documents run one by one"
        assert numbers(effect) == pytest.approx(interval([b - a for a, b in zip(before, after, strict=True)]))
        assert (effect.n, effect.outcome, effect.baseline) == (4, "loss", pytest.approx(np.mean(before)))
        assert effect.intervention == "layer 2 skipped"

    def test_documents_that_cannot_be_run_apart_are_measured_by_their_distributions(self):
        patient = admit(self.language_model)
        ward = Ward({"input_ids": ids(4), "labels": ids(4)}, divisible=False)
        assert Trials(patient.model, patient.anatomy(), [ward]).outcome == "distribution"
        assert Trials(patient.model, patient.anatomy(), [ward, ward]).outcome == "loss"

    def test_a_loss_that_some_batches_lack(self):
        patient = admit(self.language_model)
        wards = [Ward({"input_ids": ids(2), "labels": ids(2)}), Ward({"input_ids": ids(2)})]
        trials = Trials(patient.model, patient.anatomy(), wards)
        assert trials.effect(SKIP) == trials.refused == "the model returns a loss for some batches only."
        assert trials.words == ""


def divergence(one: Tensor, other: Tensor) -> float:
    p, q = (np.exp(x) / np.exp(x).sum() for x in (one.numpy(), other.numpy()))
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))


class TestDistribution:
    def masked(self) -> Patient:
        batch = {"input_ids": ids(), "attention_mask": RIGHT}
        return Patient(hf.BertForMaskedLM(hf.BertConfig(**SMALL)), batch, "bert.encoder.layer", "encoder", RIGHT.bool())

    @pytest.mark.parametrize("who", ["tensor", "logits"])
    def test_it_is_the_mean_divergence_of_real_tokens(self, who):
        patient = admit("plain") if who == "tensor" else admit(self.masked)
        with torch.no_grad():
            before = patient()
            hook = skipping(patient, 2)
            after = patient()
            hook.remove()
        values = []
        for b in range(3):
            real = range(9) if patient.real is None else patient.real[b].nonzero()[:, 0].tolist()
            values.append(float(np.mean([divergence(before[b, t], after[b, t]) for t in real])))
        whole, single = Ward(patient.batch, patient.real), Ward(patient.batch, patient.real).part
        for wards in ([whole], [single(0, 1), single(1, 3)]):
            trials = Trials(patient.model, patient.anatomy(), wards)
            effect = trials.effect(Intervention("skip-block", patient.stack, 2))
            assert trials.outcome == "distribution"
            assert "over 3 documents" in trials.words
            assert numbers(effect) == pytest.approx(interval(values))
            assert (effect.n, effect.outcome, effect.baseline) == (3, "distribution", None)

    def test_of_many_logits_evenly_spaced_tokens_are_kept(self):
        patient = admit("plain")
        with torch.no_grad():
            before = patient()
            hook = skipping(patient, 2)
            after = patient()
            hook.remove()
        _, trials, _ = plain_trials(memory=9 * 50 * 8)  # of 27 tokens 9
        values = [float(np.mean([divergence(before[b, t], after[b, t]) for t in (1, 4, 7)])) for b in range(3)]
        assert numbers(trials.effect(SKIP)) == pytest.approx(interval(values))
        assert "(one token in 3)" in trials.words

    def test_a_class_that_is_ruled_out_has_no_share(self):
        class Ruled(PlainGPT):
            def forward(self, ids: Tensor) -> Tensor:
                logits = super().forward(ids)
                logits[..., 7] = float("-inf")
                return logits

        patient = admit(lambda: Patient(Ruled(), {"ids": ids()}, "h", "decoder"))
        effect = Trials(patient.model, patient.anatomy(), [Ward(patient.batch)]).effect(SKIP)
        assert isinstance(effect, Effect)
        assert effect.change > 0.01


class TestState:
    @pytest.mark.parametrize("name", ["bert", "torch_encoder", "llama_left", "vit"])
    def test_it_is_the_share_of_the_variance_over_tokens_and_documents(self, name, reference_path):
        patient = admit(name)
        with torch.no_grad():
            before = patient().numpy()
            hook = skipping(patient, 2)
            after = patient().numpy()
            hook.remove()
        sequences, tokens = before.shape[:2]
        real = [
            [t for t in range(tokens) if patient.real is None or bool(patient.real[b, t])] for b in range(sequences)
        ]
        mean = np.mean([before[b, t] for b in range(sequences) for t in real[b]], 0)
        spread = np.mean([sum(((before[b, t] - mean) ** 2).sum() for t in real[b]) for b in range(sequences)])
        values = [
            float(sum(((after[b, t] - before[b, t]) ** 2).sum() for t in real[b]) / spread) for b in range(sequences)
        ]
        whole = Ward(patient.batch, patient.real)
        for wards in ([whole], [whole.part(0, 2), whole.part(2, 3)]):
            trials = Trials(patient.model, anatomy(name), wards)
            effect = trials.effect(Intervention("skip-block", patient.stack, 2))
            assert trials.outcome == "state"
            assert numbers(effect) == pytest.approx(interval(values))
            assert (effect.n, effect.outcome) == (3, "state")

    def test_tokens_that_come_first(self):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 3, enable_nested_tensor=False)
        states = torch.randn(9, 4, 32, generator=torch.Generator().manual_seed(1)).double()
        patient = admit(lambda: Patient(model, {"src": states}, "layers", "encoder"))
        other = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3).double().eval()
        other.load_state_dict(model.state_dict())
        swapped = Patient(other, {"src": states.transpose(0, 1)}, "layers", "encoder")

        skip = Intervention("skip-block", "encoder", 2)
        one = Trials(patient.model, patient.anatomy(), [Ward(patient.batch)]).effect(skip)
        two = Trials(other, swapped.anatomy(), [Ward(swapped.batch)]).effect(skip)
        assert one.n == 4
        assert numbers(one) == pytest.approx(numbers(two))

    def test_a_network_over_samples_counts_each_item(self):
        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

            def forward(self, x):
                return x + self.down(self.up(x).relu())

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Inner() for _ in range(3))

            def forward(self, x):
                for block in self.blocks:
                    x = block(x)
                return x

        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double()
        patient = admit(lambda: Patient(Outer(), {"x": x}, "blocks", "backbone"))
        effect = Trials(patient.model, patient.anatomy(), [Ward(patient.batch)]).effect(
            Intervention("skip-block", "backbone", 2)
        )
        assert effect.n == 5
        assert effect.change > 0


class Silenced(PlainGPT):
    """A model in which some things are there and do nothing."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        with torch.no_grad():
            self.wpe.weight.zero_()
            self.wte.weight.copy_(torch.randn(50, 32).mul(8).round() / 8)  # sums of few of them are exact


def silenced() -> Patient:
    patient = admit(lambda: Patient(Silenced(), {"ids": ids()[:, :1].expand(-1, 8).clone()}, "h", "decoder"))
    with torch.no_grad():
        patient.model.wpe.weight.zero_()
        patient.model.wte.weight.mul_(8).round_().div_(8)
        for part in (patient.block(3).attn.c_proj, patient.block(3).mlp[2]):  # a block that adds nothing
            part.weight.zero_()
            part.bias.zero_()
        patient.block(2).attn.c_attn.weight[64 + 8 : 64 + 16].zero_()  # a head without values
        patient.block(2).attn.c_attn.bias[64 + 8 : 64 + 16].zero_()
    return patient


IDENTITIES = [
    Intervention("skip-block", "decoder", 3),
    Intervention("zero-head", "decoder", 2, heads=(1,)),
    Intervention("mean-head", "decoder", 2, heads=(1,)),
    Intervention("merge-heads", "decoder", 2, groups=((0, 1),)),
    Intervention("deflate-attention", "decoder", 2, heads=(1,)),
    Intervention("mask-sink", "decoder", 2, position=7),
    Intervention("stream-means", "decoder", 0),
]


@pytest.mark.parametrize("intervention", IDENTITIES, ids=lambda one: one.kind)
@pytest.mark.parametrize("fused", [True, False])
def test_what_changes_nothing_has_no_effect_at_all(intervention, fused):
    patient = silenced()
    for block in patient.model.h:
        block.attn.fused = fused
    effect = Trials(patient.model, patient.anatomy(), [Ward(patient.batch)]).effect(intervention)
    assert numbers(effect) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["gpt2", "llama_left", "bert", "plain"])
def test_a_duplicate_is_free_to_drop_where_the_other_is_scaled_and_not_where_it_is_silenced(name):
    patient = admit(name)
    merge = Intervention("merge-heads", patient.stack, 2, groups=((0, 1),))
    silence = Intervention("zero-head", patient.stack, 2, heads=(1,))

    def effects() -> tuple[float, float]:
        trials = Trials(patient.model, anatomy(name), [Ward(patient.batch, patient.real)])
        return numbers(trials.effect(merge))[0], numbers(trials.effect(silence))[0]

    assert min(effects()) > 1e-4  # heads that write differently
    found = {weight.role: weight for weight in anatomy(name).stacks[-1].weights[1] if weight.call == "self"}
    with torch.no_grad():
        for role, weight in found.items():
            blocks = per_head(patient.model, weight) if weight.heads else []
            for block, twin in zip(blocks[1:2], blocks[:1], strict=True):
                block.copy_(twin * (3 if role == "o" else 1))
        for parameter in patient.block(2).parameters():
            if parameter.ndim == 1 and len(parameter) in (96, 32):
                parameter.zero_()  # biases and norms: what is added to the first head is added to the second
        for module in patient.block(2).modules():
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 1:
                module.weight.fill_(1)
    merged, silenced = effects()
    assert abs(merged) < 1e-12
    assert silenced > 1e-4


def test_heads_are_merged_by_one_factor_for_all_documents_measured_before():
    patient, forwards = admit("plain"), []
    model, whole = patient.model, Ward(patient.batch, forwards=forwards)
    trials = Trials(model, anatomy("plain"), [whole.part(0, 1), whole.part(1, 3)])
    merge = Intervention("merge-heads", "decoder", 2, groups=((2, 0),))
    forwards.clear()
    effect = trials.effect(merge)
    assert forwards == [1, 2] * 2
    assert "head 0 dropped and head 2 scaled instead" in effect.intervention
    merging = Merging(model, anatomy("plain"), merge)
    with torch.no_grad(), merging.watch():
        patient()
    told = trials.effect(dataclasses.replace(merge, factors=merging.factors()))
    assert numbers(effect) == pytest.approx(numbers(told), rel=1e-9)
    assert forwards == [1, 2] * 3


class Noisy(PlainGPT):
    """Draws in evaluation mode too."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + torch.randn(*ids.shape, 50)


def test_what_a_model_draws_is_the_same_in_every_run():
    patient = admit(lambda: Patient(Noisy(), {"ids": ids()}, "h", "decoder"))
    found, whole = patient.anatomy(), Ward(patient.batch)
    before = everything(patient.model)
    trials = Trials(patient.model, found, [whole.part(0, 2), whole.part(2, 3)])
    assert numbers(trials.effect(Intervention("mask-sink", "decoder", 2, position=8))) == (0.0, 0.0, 0.0)
    assert changes(before, everything(patient.model)) == []


class NoisyLoss(PlainGPT):
    """Draws for its loss."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"loss": (super().forward(ids) * torch.randn(50)).mean()}


def test_nor_does_it_matter_which_document_comes_first():
    patient = admit(lambda: Patient(NoisyLoss(), {"ids": ids()}, "h", "decoder"))
    found = survey(patient.model, lambda: patient.model(**patient.batch))
    trials = Trials(patient.model, found, [Ward(patient.batch)])
    assert trials.outcome == "loss"
    assert numbers(trials.effect(Intervention("mask-sink", "decoder", 2, position=8))) == (0.0, 0.0, 0.0)


def test_tokens_are_not_taken_for_documents():
    class Loss(nn.TransformerEncoder):
        def forward(self, src: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(src).square().mean()}

    model = Loss(nn.TransformerEncoderLayer(32, 4, 64), 3, enable_nested_tensor=False)
    states = torch.randn(2, 9, 4, 32, generator=torch.Generator().manual_seed(1)).double()
    patient = admit(lambda: Patient(model, {}, "layers", "encoder"))
    wards = [Ward({"src": batch}) for batch in states]
    trials = Trials(model, survey(model, lambda: wards[0].run(patient.model)), wards)
    assert trials.outcome == "loss"
    assert trials.effect(Intervention("skip-block", "encoder", 2)).n == 2


class Towers(PlainGPT):
    """Two stacks, of which one is computed for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.ModuleList(type(block)(32, 4, fused=True, causal=False) for block in self.h)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        y = self.wte(ids)
        for block in self.aside:
            y = block(y)
        return {"logits": super().forward(ids), "aside": y}


def test_no_effect_says_nothing_where_the_outcome_does_not_depend_on_the_stack():
    patient = admit(lambda: Patient(Towers(), {"ids": ids()}, "h", "decoder"))
    found = survey(patient.model, lambda: patient.model(**patient.batch))
    trials = Trials(patient.model, found, [Ward(patient.batch)])
    said = trials.effect(Intervention("skip-block", "encoder", 2))
    assert said == "the model's output distribution does not depend on the stack encoder."
    assert trials.effect(SKIP).change > 0


class TestRuns:
    def test_one_forward_for_each_intervention_and_none_for_one_that_is_known(self):
        _, trials, forwards = plain_trials()
        first = trials.effect(SKIP)
        assert forwards == [3, 3]
        assert trials.effect(Intervention("skip-block", "decoder", 2)) is first
        assert forwards == [3, 3]
        trials.effect(Intervention("skip-block", "decoder", 3))
        assert forwards == [3, 3, 3]

    def test_for_a_loss_documents_run_one_by_one(self):
        patient = admit(TestLoss().language_model)
        forwards: list[int] = []
        ward = Ward({"input_ids": ids(3), "labels": ids(3)}, forwards=forwards)
        Trials(patient.model, patient.anatomy(), [ward]).effect(SKIP)
        assert forwards == [3, 1, 1, 1, 1, 1, 1]

    def test_one_document_is_not_enough(self):
        patient = admit("plain")
        trials = Trials(patient.model, anatomy("plain"), [Ward(patient.batch).part(0, 1)])
        assert trials.effect(SKIP) == "one document: at least two are needed to say how sure an effect is."

    def test_packed_rows_are_told(self):
        patient = admit("plain")
        trials = Trials(patient.model, anatomy("plain"), [Ward(patient.batch, documents=object())])
        assert "several documents" in trials.effect(Intervention("stream-means", "decoder", 1))
        assert isinstance(trials.effect(SKIP), Effect)

    def test_what_only_the_forward_knows_is_a_reason_too(self):
        model, trials, _ = plain_trials()
        before = everything(model)
        assert "0 to 3" in trials.effect(Intervention("zero-head", "decoder", 1, heads=(7,)))
        assert "layers 1 to 3" in trials.effect(Intervention("skip-block", "decoder", 9))
        assert changes(before, everything(model)) == []


class Divided(PlainGPT):
    """Divides by zero where all tokens are one."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        several = (x - x.mean(1, keepdim=True)).norm(dim=(1, 2), keepdim=True) > 1e-9
        return self.head(x / several)


class TestWhatIsNotFinite:
    def divided(self) -> Patient:
        return admit(lambda: Patient(Divided(causal=False), {"ids": ids(3, 8)}, "h", "encoder"))

    def test_a_changed_output(self):
        patient = self.divided()
        trials = Trials(patient.model, patient.anatomy(), [Ward(patient.batch)])
        assert isinstance(trials.effect(Intervention("skip-block", "encoder", 3)), Effect)
        ruined = trials.effect(Intervention("stream-means", "encoder", 3))
        assert (ruined.change, ruined.low, ruined.high) == (math.inf,) * 3  # no small effect
        assert Test(SKIP, "no effect", effect_limits()).confirms(ruined) is False

    def test_the_unchanged_output(self):
        patient = self.divided()
        found = patient.anatomy()
        same = Ward({"ids": torch.full((3, 8), 5)})
        trials = Trials(patient.model, found, [same])
        assert trials.effect(SKIP) == trials.refused == "the unchanged model's output is not finite."

    def test_a_final_state_without_variance(self):
        patient = admit("bert")
        with torch.no_grad():
            patient.block(3).output.LayerNorm.weight.zero_()
        trials = Trials(patient.model, anatomy("bert"), [Ward(patient.batch, patient.real)])
        said = trials.effect(Intervention("skip-block", "encoder", 2))
        assert said == "the final state is the same for all tokens of all documents."


KINDS = [
    Intervention("skip-block", "encoder", 2, also=(3,)),
    Intervention("zero-head", "encoder", 1, heads=(1, 2)),
    Intervention("mean-head", "encoder", 1),
    Intervention("merge-heads", "encoder", 1, groups=((0, 1),)),
    Intervention("mask-sink", "encoder", 1),
    Intervention("stream-means", "encoder", 1),
    Intervention("deflate-attention", "encoder", 1),
]


class TestUntouched:
    def patient(self) -> Patient:
        patient = admit("bert")
        patient.model.train()
        patient.block(2).eval()
        patient.block(1).requires_grad_(False)
        for parameter in patient.block(3).parameters():
            parameter.grad = torch.ones_like(parameter)
        return patient

    def test_after_effects_everything_is_as_it_was(self):
        patient = self.patient()
        before = everything(patient.model)
        trials = Trials(patient.model, anatomy("bert"), [Ward(patient.batch, patient.real)])
        effects = [trials.effect(one) for one in KINDS]
        assert all(isinstance(effect, Effect) and effect.change > 1e-4 for effect in effects), effects
        assert changes(before, everything(patient.model)) == []

    @pytest.mark.parametrize("intervention", KINDS, ids=lambda one: one.kind)
    def test_also_after_a_fault_in_the_middle_of_a_forward(self, intervention):
        patient = self.patient()
        whole = Ward(patient.batch, patient.real)
        trials = Trials(patient.model, anatomy("bert"), [whole.part(0, 2), whole.part(1, 3)])
        armed = []

        def fail(module, args):
            armed.append(module)
            if len(armed) == 2:
                raise KeyboardInterrupt

        hook = patient.block(3).register_forward_pre_hook(fail)
        before = everything(patient.model)
        with pytest.raises(KeyboardInterrupt):
            trials.effect(intervention)
        assert changes(before, everything(patient.model)) == []
        hook.remove()
        assert isinstance(trials.effect(intervention), Effect)

    def test_a_changed_model_that_fails_is_a_reason_and_no_end(self):
        patient = self.patient()
        trials = Trials(patient.model, anatomy("bert"), [Ward(patient.batch, patient.real)])

        def fail(module, args):
            raise RuntimeError("out of memory\nand more")

        hook = patient.block(3).register_forward_pre_hook(fail)
        before = everything(patient.model)
        assert trials.effect(KINDS[0]) == "the changed model failed: out of memory."
        assert changes(before, everything(patient.model)) == []
        hook.remove()


@pytest.mark.parametrize(("limit", "found"), [(1e3, [Severity.FAIL]), (1e-9, [])])
def test_a_suspicion_is_confirmed_or_refuted_by_its_effect(limit, found):
    _, trials, _ = plain_trials()
    test = Test(SKIP, "no effect", (("distribution", limit),))
    suspicion = Suspicion("nothing", "decoder", Severity.FAIL, tests=(test,))
    words = dict.fromkeys(("title", "means", "harmless", "tested", "refuted_by", "command"), "")
    failure = Failure("f", **words, papers=(), valid_for="any", look=lambda evidence: Looked((suspicion,)))
    diagnosis = diagnose(Evidence(()), [failure], tester=trials)
    assert [verdict.severity for verdict in diagnosis.verdicts] == found
    assert diagnosis.outcome == "distribution"
