"""What an intervention makes of a forward equals its definition, on whatever kernel; where it cannot, it says why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from attention_twin import Twin, indices
from family import ids
from patients import PATIENTS, RIGHT, Patient, admit, anatomy
from torch import Tensor, nn

from fullrank.diagnosis.deflation import deflated, leading_triplet
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.interventions import apply
from fullrank.diagnosis.merging import Merging
from fullrank.edit import Call, Edit, Place
from fullrank.errors import EditError
from untouched import changes, everything

pytestmark = pytest.mark.usefixtures("reference_path")
IN_FLOAT32 = ["llama_eager"]  # it softmaxes so, whatever its dtype
SEES_NO_VALUES = {"llama_eager": "llama_right", "plain_softmax": "plain"}  # their twin: the same model with a kernel


def intervened(patient: Patient, where, intervention: Intervention) -> Tensor:
    before = everything(patient.model)
    with torch.no_grad():
        edit = apply(patient.model, where, intervention, real=patient.told)
        assert isinstance(edit, Edit), edit
        with edit:
            edited = patient()
    assert changes(before, everything(patient.model)) == []
    return edited


def attended(patient: Patient, monkeypatch, twin: Twin) -> Tensor:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", twin)
        return patient()


def differ(patient: Patient, one: Tensor, other: Tensor) -> float:
    return float((patient.at_real(one) - patient.at_real(other)).abs().max())


HEADS = [
    ("zero-head", 0, (1, 3)),
    ("mean-head", 0, (1, 3)),
    ("mean-head", 0, ()),
    ("mask-sink", 0, ()),
    ("mask-sink", 3, (1, 3)),
    ("deflate-attention", 0, (2,)),
]


@pytest.mark.parametrize(("kind", "position", "heads"), HEADS)
@pytest.mark.parametrize("name", PATIENTS)
def test_an_intervention_on_attention_equals_its_definition(name, kind, position, heads, monkeypatch):
    patient = admit(name)
    intervention = Intervention(kind, patient.stack, 2, heads=heads, position=position)
    edited = intervened(patient, anatomy(name), intervention)
    twins = admit(SEES_NO_VALUES.get(name, name))
    twin = Twin(kind, 1, heads, indices(patient.real), causal=patient.causal, position=position)
    expected = attended(twins, monkeypatch, twin)
    assert twin.seen == 3
    assert differ(patient, edited, expected) < (1e-5 if name in IN_FLOAT32 else 1e-9)
    unchanged = attended(twins, monkeypatch, Twin("none", 1, (), None))
    assert differ(patient, expected, unchanged) > 1e-3


@pytest.mark.parametrize("also", [(), (3,)])
@pytest.mark.parametrize("name", PATIENTS)
def test_a_skipped_block_hands_its_input_on(name, also):
    patient = admit(name)
    edited = intervened(patient, anatomy(name), Intervention("skip-block", patient.stack, 1, also=also))

    def hands_on(module, args, kwargs, output):
        stream = args[0] if args else kwargs["hidden_states"]
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    hooks = [patient.block(layer).register_forward_hook(hands_on, with_kwargs=True) for layer in (1, *also)]
    with torch.no_grad():
        expected = patient()
        for hook in hooks:
            hook.remove()
        assert differ(patient, edited, expected) < 1e-9
        assert differ(patient, edited, patient()) > 1e-3


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", [name for name in PATIENTS if name != "bert_untold"])
def test_stream_means_are_those_of_real_tokens_and_never_look_ahead(name, layer):
    patient = admit(name)
    edited = intervened(patient, anatomy(name), Intervention("stream-means", patient.stack, layer))

    def meant(X: Tensor) -> Tensor:
        X = X.clone().numpy()
        new = X.copy()
        for b, rows in enumerate(X):
            real = range(len(rows)) if patient.real is None else patient.real[b].nonzero()[:, 0].tolist()
            for t in real:
                new[b, t] = np.mean([rows[s] for s in real if s <= t or not patient.causal], 0)
        return torch.from_numpy(new)

    def given(module, args, kwargs):
        if args:
            return (meant(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": meant(kwargs["hidden_states"])}

    hook = patient.block(layer + 1).register_forward_pre_hook(given, with_kwargs=True)
    with torch.no_grad():
        expected = patient()
        hook.remove()
        assert differ(patient, edited, expected) < 1e-9
        assert differ(patient, edited, patient()) > 1e-3


PROJECTIONS = ("attn.c_proj", "attention.output.dense", "o_proj", "SelfAttention.o", "out_proj")


def projection(patient: Patient, layer: int, heads: int = 4) -> np.ndarray:
    """W_O of a block by its name, (heads, d_v, width)."""
    (weight,) = (
        value
        for name, value in patient.block(layer).named_parameters()
        if name.removesuffix(".weight").endswith(PROJECTIONS)
    )
    W = weight.detach().numpy()
    stored_transposed = type(patient.model).__name__ == "GPT2Model"
    return (W if stored_transposed else W.T).reshape(heads, -1, W.shape[0])


def written(handed: np.ndarray, W_O: np.ndarray, real) -> np.ndarray:
    """What heads add to the stream at real tokens, each as one long vector."""
    kept = range(handed.shape[2])
    rows = [(b, kept if real is None else real[b][0]) for b in range(len(handed))]
    return np.stack([
        np.concatenate([(handed[b, h, t] @ W_O[h]) for b, tokens in rows for t in tokens]) for h in range(len(W_O))
    ])  # fmt: skip


GROUPS = ((1, 3), (2, 0))


@pytest.mark.parametrize("name", PATIENTS)
def test_merged_heads_are_dropped_and_the_one_that_stays_is_the_least_squares_fit_of_their_sum(name, monkeypatch):
    patient, twins = admit(name), admit(SEES_NO_VALUES.get(name, name))
    where, real = indices(patient.real), patient.told
    before = everything(patient.model)
    merging = Merging(patient.model, anatomy(name), Intervention("merge-heads", patient.stack, 2, groups=GROUPS))
    with torch.no_grad():
        edit = merging.watch(real)
        assert isinstance(edit, Edit), edit
        with edit:
            watched = patient()
        unchanged = patient()
    assert torch.equal(patient.at_real(watched), patient.at_real(unchanged))
    assert changes(before, everything(patient.model)) == []

    look = Twin("none", 1, (), where)
    attended(twins, monkeypatch, look)
    Y = written(look.handed, projection(twins, 2), where)
    expected = [
        float(np.linalg.lstsq(Y[[kept]].T, Y[[kept, other]].sum(0), rcond=None)[0][0]) for kept, other in GROUPS
    ]
    assert merging.factors() == pytest.approx(expected, rel=1e-5 if name in IN_FLOAT32 else 1e-9)

    merge = Intervention("merge-heads", patient.stack, 2, groups=GROUPS, factors=merging.factors())
    edited = intervened(patient, anatomy(name), merge)
    factors = dict(zip((1, 2), merging.factors(), strict=True))
    twin = Twin("merge-heads", 1, (0, 1, 2, 3), where, factors=factors)
    assert differ(patient, edited, attended(twins, monkeypatch, twin)) < (1e-5 if name in IN_FLOAT32 else 1e-9)
    assert differ(patient, edited, unchanged) > 1e-3


def test_factors_are_one_number_over_all_batches():
    patient = admit("gpt2")
    how = Intervention("merge-heads", "decoder", 2, groups=((1, 3, 0),))

    def watched(*batches: Tensor) -> float:
        merging = Merging(patient.model, anatomy("gpt2"), how)
        for batch in batches:
            with torch.no_grad(), merging.watch():
                patient.model(input_ids=batch)
        (factor,) = merging.factors()
        return factor

    whole = patient.batch["input_ids"]
    apart = watched(*whole.split(1))
    assert apart == pytest.approx(watched(whole), rel=1e-12)
    assert abs(apart - watched(whole[:1])) > 1e-3


def t5() -> Patient:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
    batch = {
        "input_ids": ids(),
        "attention_mask": RIGHT,
        "decoder_input_ids": ids(3, 7),
        "decoder_attention_mask": RIGHT[:, :7],
        "use_cache": False,
    }
    return Patient(hf.T5Model(config), batch, "decoder.block", "decoder", RIGHT[:, :7].bool(), causal=True)


@pytest.mark.parametrize(("kind", "position", "heads"), HEADS)
def test_cross_attention_counts_the_tokens_of_both_stacks(kind, position, heads, monkeypatch):
    patient = admit(t5)
    found = patient.anatomy()
    intervention = Intervention(kind, "decoder", 2, heads=heads, part="cross", position=position)
    with torch.no_grad():
        real = {"encoder": RIGHT.bool(), "decoder": RIGHT[:, :7].bool()}
        with apply(patient.model, found, intervention, real=real):
            edited = patient()
    # two calls of the encoder, then self and cross in turns
    where = indices(RIGHT[:, :7], RIGHT)
    twin = Twin(kind, 5, heads, where, causal=True, position=position, cross=True)
    expected = attended(patient, monkeypatch, twin)
    assert twin.seen == 6
    assert differ(patient, edited, expected) < 1e-9
    assert differ(patient, edited, attended(patient, monkeypatch, Twin("none", 0, (), None))) > 1e-4


def test_what_nothing_is_hidden_by_runs_the_same_kernel():
    patient = admit("plain")  # causal: of the last key no other query knows
    with torch.no_grad():
        last = Intervention("mask-sink", "decoder", 2, position=8)
        beyond = Intervention("mask-sink", "decoder", 2, position=9)
        assert torch.equal(intervened(patient, anatomy("plain"), last), patient())
        assert torch.equal(intervened(patient, anatomy("plain"), beyond), patient())


class TestLeadingTriplet:
    @pytest.mark.parametrize("shape", [(9, 9), (40, 7), (150, 150), (200, 90), (90, 200)])
    def test_it_is_that_of_the_factorised_map(self, shape, generator):
        A = (2 * torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator)).softmax(-1)
        s, u, v = leading_triplet(A)
        U, S, Vh = np.linalg.svd(A.numpy())
        assert np.allclose(s.numpy(), S[..., 0], rtol=1e-5)
        rank_one = s[..., None, None] * u[..., None] * v[..., None, :]
        expected = S[..., 0, None, None] * U[..., :, :1] * Vh[..., :1, :]
        assert np.linalg.norm(rank_one.numpy() - expected) < 1e-3 * np.linalg.norm(expected)

    def test_of_a_pointer_it_takes_a_direction_of_gain_one(self):
        A = torch.eye(100, dtype=torch.float64)
        s, u, v = leading_triplet(A)
        assert float(s) == pytest.approx(1)
        assert torch.allclose(A @ v, s * u)


class TestRefusals:
    """Reasons instead of edits, and nothing left behind."""

    def reason(self, patient: Patient, intervention: Intervention, **more) -> str:
        before = everything(patient.model)
        found = apply(patient.model, patient.anatomy(), intervention, **more)
        assert changes(before, everything(patient.model)) == []
        assert isinstance(found, str)
        return found

    def test_a_stack_that_is_not_there(self):
        assert "no stack 'vision'; it has decoder" in self.reason(
            admit("plain"), Intervention("zero-head", "vision", 1)
        )

    @pytest.mark.parametrize("kind", ["skip-block", "zero-head", "mean-head", "mask-sink", "deflate-attention"])
    def test_a_layer_that_is_not_there_and_the_others_undone(self, kind):
        assert "layers 1 to 3" in self.reason(admit("plain"), Intervention(kind, "decoder", 1, also=(4,)))

    def test_a_part_that_is_not_there(self):
        said = self.reason(admit("plain"), Intervention("zero-head", "decoder", 1, part="cross"))
        assert "no attention call was seen" in said

    @pytest.mark.parametrize("kind", ["stream-means", "zero-head"])
    def test_a_stream_of_samples_has_no_tokens(self, kind):
        layers = [module for _ in range(3) for module in (nn.Linear(8, 8), nn.ReLU())]
        model = nn.Sequential(*layers)
        patient = Patient(model, {"input": torch.ones(4, 8)}, "", "backbone")
        assert "no tokens" in self.reason(patient, Intervention(kind, "backbone", 1))
        assert "no modules" in self.reason(patient, Intervention("skip-block", "backbone", 1))

    @pytest.mark.parametrize("kind", ["stream-means", "mean-head", "mask-sink"])
    def test_rows_of_several_documents(self, kind):
        said = self.reason(admit("plain"), Intervention(kind, "decoder", 1), packed=True)
        assert said.startswith("the rows of the batch hold several documents each, and ")

    @pytest.mark.parametrize("kind", ["skip-block", "zero-head", "deflate-attention"])
    def test_what_needs_no_sequence_is_done_to_packed_rows(self, kind):
        patient = admit("plain")
        edit = apply(patient.model, anatomy("plain"), Intervention(kind, "decoder", 1), packed=True)
        assert isinstance(edit, Edit)
        edit.undo()


@pytest.mark.parametrize("kind", ["zero-head", "mean-head", "mask-sink", "deflate-attention"])
def test_a_head_that_is_not_there_is_said_in_the_forward(kind):
    patient = admit("plain")
    intervention = Intervention(kind, "decoder", 1, heads=(4,))
    with (
        torch.no_grad(),
        apply(patient.model, anatomy("plain"), intervention),
        pytest.raises(EditError, match="0 to 3"),
    ):
        patient()


def test_a_map_that_the_call_does_not_show_is_not_deflated(generator):
    Q, K, V = (torch.randn(2, 4, 9, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    call = Call(Place("decoder", 1, "self", "h.0.attn"), "scaled_dot_product_attention", V, query=Q, key=K)
    scores = Q @ K.mT / 8**0.5
    deflated(call, scores.softmax(-1) @ V, (None, None))
    capped = 2 * torch.tanh(scores / 2)
    with pytest.raises(EditError, match=r"the map of h\.0\.attn cannot be deflated"):
        deflated(call, capped.softmax(-1) @ V, (None, None))


@pytest.mark.parametrize(
    ("groups", "factors", "also", "said"),
    [
        ((), (), (), "in groups of two or more"),
        (((1,),), (2.0,), (), "in groups of two or more"),
        (((1, 2), (2, 3)), (2.0, 2.0), (), "each in one of them"),
        (((1, 2),), (2.0,), (2,), "heads of one layer"),
        (((1, 2),), (), (), "was not measured"),
    ],
)
def test_heads_that_cannot_be_merged_are_a_reason(groups, factors, also, said):
    patient = admit("plain")
    how = Intervention("merge-heads", "decoder", 1, groups=groups, factors=factors, also=also)
    before = everything(patient.model)
    assert said in apply(patient.model, anatomy("plain"), how)
    if not factors:
        assert groups or said in Merging(patient.model, anatomy("plain"), how).watch()
    assert changes(before, everything(patient.model)) == []


def test_merging_says_what_it_does_not_see():
    patient = admit("plain")

    def merging(groups) -> Merging:
        return Merging(patient.model, anatomy("plain"), Intervention("merge-heads", "decoder", 1, groups=groups))

    with pytest.raises(EditError, match="was not seen"):
        merging(((0, 1),)).factors()
    with torch.no_grad(), merging(((0, 4),)).watch(), pytest.raises(EditError, match="heads 0 to 3"):
        patient()
    with torch.no_grad():
        patient.block(1).attn.c_attn.weight[64 : 64 + 8].zero_()  # values of the first head
        patient.block(1).attn.c_attn.bias[64 : 64 + 8].zero_()
    silent = merging(((0, 1),))
    with torch.no_grad(), silent.watch():
        patient()
    with pytest.raises(EditError, match="writes nothing"):
        silent.factors()


class Pooled(nn.Module):
    """Fewer keys than queries: every second token is attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(32, 96), 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("kind", "position", "heads"), HEADS)
def test_pooled_keys_are_no_ones_own(kind, position, heads, monkeypatch):
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1)).double()
    patient = admit(lambda: Patient(nn.Sequential(*(Pooled() for _ in range(3))), {"input": x}, "", "encoder"))
    edited = intervened(patient, patient.anatomy(), Intervention(kind, "encoder", 2, heads=heads, position=position))
    twin = Twin(kind, 1, heads, None, position=position, cross=True)
    assert differ(patient, edited, attended(patient, monkeypatch, twin)) < 1e-9
    assert differ(patient, edited, attended(patient, monkeypatch, Twin("none", 0, (), None))) > 1e-4
