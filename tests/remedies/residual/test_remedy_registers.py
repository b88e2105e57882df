"""Registers: vision models by hand with further tokens."""

import pytest
import torch
import transformers as hf
from remedy_patients import build
from torch import nn

import fullrank
from fullrank.edit import edits_in, rewrite_attention
from fullrank.errors import RemedyError
from fullrank.remedies import Patient


def zoo_by_hand(model, images, R):
    X = model.embedding(images)
    tokens = X.shape[1]
    X = torch.cat([X, R.expand(len(X), -1, -1)], 1)
    for block in model.blocks:
        X = block(X)
    return model.head(model.final_norm(X[:, :tokens]).mean(1))


def vit_by_hand(model, images, R):
    X = model.embeddings(images)
    tokens = X.shape[1]
    X = torch.cat([X, R.expand(len(X), -1, -1)], 1)
    for block in model.layers:
        out = block(X)
        X = out if isinstance(out, torch.Tensor) else out[0]
    return model.layernorm(X[:, :tokens])


@pytest.mark.parametrize(("name", "by_hand"), [("zoo_vision", zoo_by_hand), ("vit", vit_by_hand)])
@pytest.mark.parametrize("number", [1, 4])
def test_blocks_see_them_and_nothing_else_does(name, by_hand, number):
    case = build(name)
    with torch.no_grad():
        with fullrank.repair(case.model, "registers", batch=case.batch, number=number, std=1.0) as repair:
            found = case()
            (R,) = (p.detach().clone() for n, p in case.model.named_parameters() if "fullrank" in n)
        assert R.shape == (number, 32)
        assert repair.applied[0].parameters == number * 32
        expected = by_hand(case.model, case.batch["pixel_values"], R)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_draw_is_that_of_the_seed():
    case = build("zoo_vision")

    def drawn(**parameters):
        state = torch.get_rng_state()
        with fullrank.repair(case.model, "registers", batch=case.batch, **parameters):
            (R,) = (p.detach().clone() for n, p in case.model.named_parameters() if "fullrank" in n)
        assert torch.equal(torch.get_rng_state(), state)
        return R

    assert torch.equal(drawn(seed=1), drawn(seed=1))
    assert not torch.equal(drawn(seed=1), drawn(seed=2))
    assert drawn(number=64).std() == pytest.approx(0.02, rel=0.05)


def test_they_are_one_graph_for_a_compiler():
    case = build("zoo_vision")
    torch._dynamo.reset()
    with torch.no_grad(), fullrank.repair(case.model, "registers", batch=case.batch):
        compiled = torch.compile(case.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(case.answer(compiled), case(), rtol=0, atol=1e-10)
    torch._dynamo.reset()


def test_windows_take_no_more_tokens():
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4)
    model = hf.SwinModel(config).eval()
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RemedyError, match="registers"):
        fullrank.repair(model, "registers", batch={"pixel_values": images})


def test_they_can_take_up_the_weight_that_has_nowhere_to_go():
    """Trained alone to be looked at, they are: what sinks in patches are for."""
    case = build("zoo_vision")
    for p in case.model.parameters():
        p.requires_grad_(False)
    with fullrank.repair(case.model, "registers", batch=case.batch, std=0.5):
        masses = []

        def look(call):
            A = (call.query @ call.key.mT * call.query.shape[-1] ** -0.5).softmax(-1)
            masses.append(A[:, :, :-4, -4:].sum(-1).mean())
            return call

        anatomy = Patient(case.model, case).anatomy
        (R,) = (p for n, p in case.model.named_parameters() if "fullrank" in n)
        optimiser = torch.optim.Adam([R], lr=0.3)
        with rewrite_attention(case.model, anatomy, before=look):
            mass = []
            for _ in range(15):
                masses.clear()
                case()
                mass.append(float(masses[0].detach()))
                optimiser.zero_grad()
                (-masses[0]).backward()
                optimiser.step()
    assert mass[0] < 0.4
    assert mass[-1] > 0.5


BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def made(kind, config, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(hf, kind)(getattr(hf, config)(**BASE, **options)).eval()


def without_a_trace(model, match, images=IMAGES, **batch):
    """The remedy is refused, and everything is as it was."""
    names, states = list(model.state_dict()), {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(RemedyError, match=match):
        fullrank.repair(model, "registers", batch={"pixel_values": images, **batch})
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    assert edits_in(model) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_inside_the_blocks_take_no_more_tokens(dtype):
    model = made("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=0).to(dtype)
    without_a_trace(model, "answer otherwise where patches change places", IMAGES.to(dtype))


def test_feature_maps_made_inside_the_stack_are_not_scrambled():
    model = made("Dinov2Backbone", "Dinov2Config", out_features=["stage1", "stage3"])
    without_a_trace(model, r"feature_maps.0 of Dinov2Backbone is \(2, 40, 4, 4\) with more tokens and \(2, 32, 4, 4\)")


def test_hidden_states_that_are_returned_keep_their_form():
    model = made("DeiTModel", "DeiTConfig")
    without_a_trace(model, r"hidden_states.1 of DeiTModel is \(2, 22, 32\) with more", output_hidden_states=True)
    fullrank.repair(model, "registers", batch={"pixel_values": IMAGES}).undo()


class Counting(nn.TransformerEncoderLayer):
    def __init__(self, error):
        super().__init__(32, 4, 64, batch_first=True, norm_first=True)
        self.error = error

    def forward(self, x, **ignored):
        if x.shape[1] != 16:
            raise self.error
        return super().forward(x)


class Images(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 5)
        self.blocks = nn.ModuleList(Counting(error) for _ in range(3))

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("error", [AssertionError("16 tokens wanted"), AssertionError(), KeyError("more")], ids=repr)
def test_what_fails_in_any_way_with_more_tokens_is_left_as_it_was(error):
    without_a_trace(Images(error).eval(), "does not run with more tokens: " + (str(error) or "AssertionError"))


def test_an_interruption_goes_through_and_takes_them_out():
    model = Images(KeyboardInterrupt()).eval()
    names = list(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        fullrank.repair(model, "registers", batch={"pixel_values": IMAGES})
    assert list(model.state_dict()) == names
    assert edits_in(model) == ()
