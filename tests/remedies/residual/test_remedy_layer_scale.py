"""LayerScale: a number for each feature of each branch."""

import pytest
import stages
import torch
from blocks import NAMES, by_hand, close, repaired
from schemes import deep, residual, states
from stages import STAGED, last_maps, staged
from torch import nn

import fullrank
from fullrank.errors import RemedyError

PLACE = {"attention": 0, "mlp": 1}


@pytest.mark.parametrize("name", NAMES)
def test_each_feature_of_each_branch_has_a_number(name):
    found, gamma = repaired(name, "layer-scale")
    assert [g.shape for g in gamma] == [(32,)] * 6
    close(found, by_hand(name, lambda layer, b, X, F: X + gamma[2 * (layer - 1) + PLACE[b]] * F))


@pytest.mark.parametrize(("depth", "start", "expected"), [(2, "none", 1e-5), (2, "0.3", 0.3), (25, "none", 1e-6)])
def test_where_it_starts(depth, start, expected):
    model, X = deep(depth, width=16)
    with fullrank.repair(model, f"layer-scale?start={start}", batch={"inputs_embeds": X}) as repair:
        gammas = [p for n, p in model.named_parameters() if "fullrank" in n]
        assert len(gammas) == 2 * depth
        assert repair.parameters == 2 * depth * 16
        assert all(torch.equal(g, torch.full((16,), expected)) for g in gammas)


@pytest.mark.parametrize("name", STAGED)
def test_each_stage_has_numbers_for_its_own_features(name):
    case = staged(name)
    found, gamma = stages.repaired(case, "layer-scale")
    assert [[len(g) for g in each] for each in gamma] == [[16]] * 4 + [[32]] * 4
    with torch.no_grad():
        for last, (g,) in zip(last_maps(case.model), gamma, strict=True):
            last.weight.mul_(g[:, None] if last.weight.ndim == 2 else g)
            last.bias.mul_(g)
        close(found, case())


class Convolution(nn.Module):
    """A block of convolutions, with features before the grid."""

    def __init__(self, width):
        super().__init__()
        self.mix, self.map = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.map(torch.tanh(self.mix(x)))


def test_a_stream_with_features_before_the_grid_is_refused():
    model = nn.Sequential(*(Convolution(8) for _ in range(3)))
    images = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RemedyError, match="does not hold features last, as layer-scale needs"):
        fullrank.repair(model, "layer-scale", batch=(images,))


def test_at_first_tokens_pass_almost_unchanged():
    model, X = deep(placement="post")
    assert residual(states(model, X)[-1]) < 0.01
    with fullrank.repair(model, "layer-scale", batch={"inputs_embeds": X}):
        assert residual(states(model, X)[-1]) > 0.98
