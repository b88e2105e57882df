"""Weights that a remedy cannot read, count or reach: refused before anything is changed, or named."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import linear

import fullrank
from fullrank.errors import RemedyError
from fullrank.remedies.covering import branches_of
from fullrank.remedies.patient import Patient
from untouched import changes, everything

TEXT = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(20).reshape(2, 10) % 32
BATCH = {"input_ids": IDS, "use_cache": False}
WRITERS = (
    "scaled-init", "small-init", "small-init?how=draw", "t-fixup", "orthogonal-init", "bn-orthogonalise",
    "sigma-reparam", "deepscale-init",
)  # fmt: skip
EVERY = (*WRITERS, "qk-scale-init", "value-output-sign")


def made(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def llama(**options):
    return made(hf.LlamaModel, hf.LlamaConfig(**TEXT | {"num_hidden_layers": 2} | options))


def jamba():
    """Mamba in layers 1 and 3, attention in layer 2."""
    return made(
        hf.JambaModel,
        hf.JambaConfig(
            **TEXT, num_hidden_layers=3, num_key_value_heads=2, num_experts=1, use_mamba_kernels=False,
            attn_layer_period=3, attn_layer_offset=1, mamba_d_state=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    )  # fmt: skip


def delta():
    """A gated delta rule in layer 1, attention in layer 2."""
    return made(
        hf.Qwen3NextModel,
        hf.Qwen3NextConfig(
            **TEXT, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, num_experts=0, mlp_only_layers=[0, 1],
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    )  # fmt: skip


@pytest.mark.parametrize("remedy", ["scaled-init", "t-fixup", "deepscale-init"])
@pytest.mark.parametrize(("build", "branch"), [(jamba, r"layers\.0\.mamba"), (delta, r"layers\.0\.linear_attn")])
def test_where_a_branch_has_no_last_weight_that_is_known_depth_is_not_counted(remedy, build, branch):
    model = build()
    before = everything(model)
    with pytest.raises(RemedyError, match=rf"of the branch {branch} of decoder layer 1 no last weight is known"):
        fullrank.repair(model, remedy, batch=BATCH)
    assert [what for what in changes(before, everything(model)) if what != "versions"] == []


def test_a_branch_that_dropout_returns_is_that_of_the_map_before_it():
    """Fourier maps have no weights, and the MLP's last weight is that before its dropout."""
    config = hf.FNetConfig(**{k: v for k, v in TEXT.items() if k != "num_attention_heads"}, num_hidden_layers=2)
    model = made(hf.FNetModel, config)
    with pytest.raises(
        RemedyError, match=r"of the branch encoder\.layer\.0\.fourier.* of \S+ layer 1 .*, nor of 1 more"
    ):
        fullrank.repair(model, "scaled-init", batch={"input_ids": IDS})


def test_branches_are_counted_as_they_are_added_and_not_by_the_weights_that_are_known():
    model = jamba()
    patient = Patient(model, lambda: model(**BATCH))
    assert branches_of(patient) == {"decoder": 6}
    last = [w for layer in patient.anatomy.stacks[0].weights for w in layer if w.role in ("o", "down")]
    assert len(last) == 4


def test_parts_that_share_one_branch_are_one():
    """Differential attention calls the kernel twice for one W_O."""
    model = made(hf.DiffLlamaModel, hf.DiffLlamaConfig(**TEXT, num_hidden_layers=2, num_key_value_heads=2))
    patient = Patient(model, lambda: model(**BATCH))
    assert branches_of(patient) == {"decoder": 4}
    old = model.layers[1].self_attn.o_proj.weight.detach().clone()
    with fullrank.repair(model, "scaled-init", batch=BATCH):
        torch.testing.assert_close(model.layers[1].self_attn.o_proj.weight.detach(), old / 2)


def stayed(model, before):
    """Names of matrices of the blocks that have the numbers that they had."""
    return {n for n, p in model.named_parameters() if "layers." in n and p.ndim > 1 and torch.equal(p, before[n])}


@pytest.mark.parametrize("build", [jamba, delta])
def test_what_all_weights_of_the_blocks_leaves_out_is_named(build):
    model = build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with fullrank.repair(model, "small-init", batch=BATCH) as handle:
        left = stayed(model, before)
        (note,) = handle.notes
    said, _, more = note.partition("stay as they are: ")[2].rstrip(".").partition(" and ")
    assert set(said.split(", ")) <= left
    assert len(said.split(", ")) + int(more.split(" ")[0] or 0) == len(left)


def test_what_is_all_reached_has_no_note():
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with fullrank.repair(model, "small-init", batch=BATCH) as handle:
        assert stayed(model, before) == set()
        assert handle.notes == ()


def test_latent_projections_and_routers_are_named():
    config = hf.DeepseekV3Config(
        **TEXT, num_hidden_layers=1, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=16, first_k_dense_replace=0,
    )  # fmt: skip
    model = made(hf.DeepseekV3Model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with fullrank.repair(model, "small-init", batch=BATCH) as handle:
        named = {name for note in handle.notes for name in note.partition("as it is: ")[2].rstrip(".").split(", ")}
        named |= {name for note in handle.notes for name in note.partition("as they are: ")[2].rstrip(".").split(", ")}
        assert named - {""} == stayed(model, before)


@pytest.mark.parametrize("remedy", ["value-output-sign", "qk-scale-init", "bn-orthogonalise"])
def test_branches_that_remedies_of_attention_do_not_see_are_named(remedy):
    model = jamba()
    with fullrank.repair(model, remedy, batch=BATCH) as handle:
        assert "layers.0.mamba, layers.2.mamba." in " ".join(handle.notes)


class Scaled(nn.Module):
    """A map with weights in eight bits and their scale apart."""

    def __init__(self, plain):
        super().__init__()
        self.scale = nn.Parameter(plain.weight.detach().abs().max() / 100, requires_grad=False)
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("remedy", WRITERS)
def test_eight_bits_with_their_scale_apart_are_refused(remedy):
    model = llama()
    for layer in model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Scaled(getattr(layer.mlp, name)))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RemedyError, match="is stored as float8_e4m3fn"):
        fullrank.repair(model, remedy, batch=BATCH)
    assert all(torch.equal(t.float(), before[n].float()) for n, t in model.state_dict().items())


@pytest.mark.parametrize("remedy", EVERY)
def test_offloaded_weights_are_refused(remedy):
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(RemedyError, match=r"is offloaded, so that its values .*; load the model whole"):
        fullrank.repair(model, remedy, batch=BATCH)


@pytest.mark.parametrize("remedy", [one for one in EVERY if one != "sigma-reparam"])
def test_weights_that_a_parametrisation_makes_are_refused_with_the_order_to_take(remedy):
    model = llama()
    before = everything(model)
    with pytest.raises(
        RemedyError, match=r"is made by a parametrisation \(SigmaReparam\).*; apply what changes weights"
    ):
        fullrank.repair(model, ["sigma-reparam", remedy], batch=BATCH)
    assert [what for what in changes(before, everything(model)) if what != "versions"] == []


_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by peft


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("remedy", ["scaled-init", "small-init", "value-output-sign", "sigma-reparam"])
def test_what_a_normalised_weight_is_made_of_is_refused_since_its_size_has_no_effect(remedy):
    model = llama()
    torch.nn.utils.weight_norm(model.layers[0].self_attn.o_proj)
    before = everything(model)
    with pytest.raises(
        RemedyError, match=r"layers\.0\.self_attn\.o_proj\.weight_v is one of those that a weight is made of"
    ):
        fullrank.repair(model, remedy, batch=BATCH)
    assert [what for what in changes(before, everything(model)) if what != "versions"] == []


@pytest.mark.parametrize(
    "remedy",
    ["scaled-init", "small-init", "t-fixup", "bn-orthogonalise", "value-output-sign", "qk-scale-init"],
)
def test_what_wraps_a_model_changes_nothing_of_what_weights_become(remedy):
    alone, inside = llama(), llama()
    wrapped = nn.DataParallel(inside)
    with (
        fullrank.repair(alone, remedy, batch=BATCH) as expected,
        fullrank.repair(wrapped, remedy, batch=BATCH) as found,
    ):
        assert expected.notes == found.notes == ()
        with torch.no_grad():
            torch.testing.assert_close(wrapped(**BATCH)[0], alone(**BATCH)[0], rtol=1e-5, atol=1e-6)


def adapted():
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["v_proj", "o_proj"], r=2)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.5)
    return model


@_PEFT
def test_adapters_beside_values_and_outputs_are_refused_since_the_sign_would_not_hold():
    model = adapted()
    with pytest.raises(RemedyError, match=r"v_proj\.lora_B\.default\.weight adds to W_V or W_O of decoder layer 1"):
        fullrank.repair(model, "value-output-sign", batch=BATCH)


@_PEFT
@pytest.mark.parametrize("remedy", ["small-init", "scaled-init", "bn-orthogonalise?roles=attention", "sigma-reparam"])
def test_adapters_beside_the_weights_that_are_changed_are_named(remedy):
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    with fullrank.repair(model, remedy, batch=BATCH) as handle:
        now = dict(model.named_parameters())
        assert all(torch.equal(now[n], p) for n, p in before.items())
        said = [note for note in handle.notes if "such as adapters, stays as it is: " in note]
        assert len(said) == 1
        assert "lora_" in said[0]
