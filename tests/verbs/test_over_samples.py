"""Networks over samples: feed-forward and convolutional, examined in one call."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import fullrank
from golden import assert_golden, golden

examine = functools.partial(fullrank.examine, reference=False)  # rows are compared here, not verdicts


def draw(*shape: int, seed: int = 100) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def initialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The default initialisation of every layer, from a generator of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def sequential(depth: int, *, norm: bool, width: int = 128, classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth + 1):
        layers.append(nn.Linear(784 if index == 0 else width, width, bias=not norm))
        layers.extend([nn.BatchNorm1d(width)] if norm else [])
        layers.append(nn.ReLU())
    return initialised(nn.Sequential(*layers, nn.Linear(width, classes)))


class Loop(nn.Module):
    """The same network written by hand: lists of layers and norms, the activation a function."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(784 if i == 0 else 128, 128, bias=False) for i in range(depth + 1))
        self.norms = nn.ModuleList(nn.BatchNorm1d(128) for _ in range(depth + 1))
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = functional.relu(norm(linear(x)))
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(given, width, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages on attributes, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(Residual(8, 8, 1), Residual(8, 8, 1))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(functional.relu(self.stem(x)))).mean((2, 3)))


def states_of(model, x, modules):
    """What these modules return, by plain hooks."""
    seen = []
    handles = [module.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone())) for module in modules]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def values(report, metric):
    rows = [row for row in report.rows if row.metric == metric]
    assert {row.scope for row in rows} == {"samples"}
    return {row.layer: row.value for row in rows}


def test_the_rank_of_a_relu_network_falls_with_depth_as_published():
    report = examine(sequential(32, norm=False), draw(128, 784))
    rank, participation = values(report, "numerical_rank"), values(report, "participation_ratio")
    depths = (0, 2, 4, 6, 10, 12, 20, 32)
    assert_golden("bn-fig1-rank-synthetic", [rank[depth + 1] for depth in depths])
    assert_golden("bn-fig1-participation", [participation[depth + 1] for depth in (2, 4)])


def test_batch_norm_keeps_the_rank_at_every_depth_when_it_uses_the_statistics_of_the_batch():
    model = sequential(32, norm=True)
    report = examine(model, draw(128, 784), batch_statistics=True)
    rank, participation = values(report, "numerical_rank"), values(report, "participation_ratio")
    expected, tolerance = golden("bn-fig1-rank-bn")["expected"], golden("bn-fig1-rank-bn")["tolerance"]
    assert all(abs(rank[layer] - expected) <= tolerance for layer in range(1, 34))
    assert_golden("bn-fig1-participation-bn", [participation[1], participation[33]])
    assert any("used the mean and variance of each batch" in note for note in report.about["notes"])


def test_batch_norms_of_a_fresh_network_do_nothing_in_evaluation_and_the_report_says_so():
    model = sequential(12, norm=True)
    report = examine(model, draw(128, 784))
    assert values(report, "participation_ratio")[13] < 1.5
    assert any("no batch norm of this model has seen a batch" in note for note in report.about["notes"])
    model.train()
    with torch.no_grad():
        model(draw(128, 784))
    trained = examine(model, draw(128, 784))
    assert any("running mean and variance" in note for note in trained.about["notes"])
    assert model.training


def test_statistics_of_the_batch_leave_no_trace_not_even_in_the_running_ones():
    model = sequential(2, norm=True)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    examine(model, draw(16, 784), batch_statistics=True)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == flags


def test_statistics_of_the_batch_asked_of_a_model_without_them_are_answered():
    report = examine(sequential(2, norm=False), draw(16, 784), batch_statistics=True)
    assert any("batch_statistics=True changes nothing" in note for note in report.about["notes"])


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_a_loop_written_by_hand_is_the_same_network(batch_statistics):
    flat, loop = sequential(5, norm=True), Loop(5)
    for index, (linear, norm) in enumerate(zip(loop.linears, loop.norms, strict=True)):
        linear.load_state_dict(flat[3 * index].state_dict())
        norm.load_state_dict(flat[3 * index + 1].state_dict())
    one = examine(flat, draw(32, 784), batch_statistics=batch_statistics)
    other = examine(loop, draw(32, 784), batch_statistics=batch_statistics)
    assert [(r.layer, r.metric, r.value) for r in one.rows] == [(r.layer, r.metric, r.value) for r in other.rows]
    assert any("its 6 layers of weights" in note for note in one.about["notes"])


def test_numbers_are_those_of_the_matrix_of_samples():
    model, x = sequential(3, norm=False).double(), draw(24, 784).double()
    report = examine(model, x)
    states = [x, *states_of(model, x, [module for module in model if isinstance(module, nn.ReLU)])]
    assert sorted(values(report, "rms")) == [0, 1, 2, 3, 4]
    for layer, X in enumerate(states):
        sigma = torch.linalg.svdvals(X)
        unit = X / X.norm(dim=1, keepdim=True)
        cosine = (unit @ unit.T)[~torch.eye(24, dtype=torch.bool)].mean()
        gram = X @ X.T
        eigenvalues = torch.linalg.eigvalsh(gram)
        expected = {
            "rms": X.square().mean().sqrt(),
            "similarity": cosine,
            "residual": (X - X.mean(0)).norm() / X.norm(),
            "stable_rank": sigma.square().sum() / sigma[0].square(),
            "centered_participation_ratio": _participation(torch.linalg.svdvals(X - X.mean(0))),
            "soft_rank": (sigma.square() >= 0.5 * sigma.square().sum() / X.shape[1]).sum(),
            "orthogonality_gap": (gram / gram.trace() - torch.eye(24) / 24).norm(),
            "isometry_gap": eigenvalues.mean().log() - eigenvalues.log().mean(),
        }
        for metric, value in expected.items():
            assert_close(values(report, metric)[layer], float(value), rtol=1e-6, atol=1e-9, msg=f"{metric} {layer}")
    share = {layer: float((states[layer] - states[layer - 1]).norm() / states[layer - 1].norm()) for layer in (2, 3, 4)}
    assert_close(values(report, "update_share"), share, rtol=1e-6, atol=0)


def _participation(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.square().sum().square() / sigma.pow(4).sum()


def test_a_residual_convolutional_network_has_its_blocks_and_a_state_of_whole_images():
    model, x = initialised(ResNet()), draw(6, 3, 8, 8)
    report = examine(model, x)
    assert [stack["blocks"] for stack in report.about["stacks"]] == [4]
    blocks = [*model.layer1, *model.layer2]
    states = states_of(model.eval(), x, blocks)
    for layer, X in enumerate(states, 1):
        assert_close(values(report, "rms")[layer], float(X.square().mean().sqrt()), rtol=1e-5, atol=0)
        sigma = torch.linalg.svdvals(X.flatten(1).double())
        ratio = float(sigma.square().sum() / sigma[0].square())
        assert_close(values(report, "stable_rank")[layer], ratio, rtol=1e-4, atol=0)


def test_a_plain_convolutional_network_is_a_chain_of_layers():
    model = nn.Sequential(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU()
        ),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.Tanh(),
        nn.Linear(12, 10),
    )
    report = examine(initialised(model), draw(5, 3, 8, 8))
    assert report.about["stacks"][0]["path"] == "0.0"
    assert sorted(values(report, "similarity")) == [0, 1, 2, 3]
    pooled = states_of(model.eval(), draw(5, 3, 8, 8), [model[0][3], model[0][5], model[3]])
    found = values(report, "rms")
    assert_close([found[1], found[2], found[3]], [float(X.square().mean().sqrt()) for X in pooled], rtol=1e-5, atol=0)


def test_the_last_layer_counts_where_it_is_no_head():
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())))
    report = examine(initialised(model), draw(8, 16))
    assert sorted(values(report, "rms")) == [0, 1, 2, 3, 4]
    out = states_of(model, draw(8, 16), [model[7]])[0]
    assert_close(values(report, "rms")[4], float(out.square().mean().sqrt()), rtol=1e-5, atol=0)


def test_several_batches_give_a_mean_and_its_standard_error():
    model = sequential(2, norm=False)
    batches = [draw(16, 784, seed=seed) for seed in range(3)]
    together = examine(model, batches)
    alone = [values(examine(model, batch), "stable_rank")[3] for batch in batches]
    (row,) = [row for row in together.rows if row.metric == "stable_rank" and row.layer == 3]
    assert row.n == 3
    assert_close(row.value, sum(alone) / 3)
    assert_close(row.stderr, float(torch.tensor(alone, dtype=torch.float64).std() / 3**0.5))


def test_one_sample_gives_na_with_the_reason():
    report = examine(sequential(2, norm=False), draw(1, 784))
    (row,) = [row for row in report.rows if row.metric == "similarity" and row.layer == 2]
    assert row.value is None
    assert "two samples" in row.note


def test_such_a_report_is_printed_drawn_and_saved(tmp_path, capsys):
    report = examine(sequential(3, norm=True), draw(32, 784), batch_statistics=True)
    report.print()
    assert "over samples instead of tokens" in capsys.readouterr().out
    assert report.figure("participation_ratio") is not None
    report.save_html(tmp_path / "report.html")
    assert "over samples instead of tokens" in (tmp_path / "report.html").read_text()
    json.loads(report.to_json())


def test_a_network_with_branches_is_answered_with_the_way_out():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.left(x).relu() + self.right(x).relu())

    with pytest.raises(fullrank.FullrankError, match="no repeated blocks"):
        examine(Branches(), draw(4, 8))


def test_contexts_asked_of_a_network_without_tokens_are_answered():
    with pytest.raises(fullrank.FullrankError, match=r"contexts= was given, but .* has no tokens"):
        examine(sequential(2, norm=False), draw(8, 784), contexts=[8, 16])


class WithLoss(nn.Module):
    """The loss of a batch beside its logits."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_gradients_of_weights_with_the_statistics_of_the_batch_are_those_of_a_step_of_training():
    model = WithLoss(sequential(3, norm=True))
    batch = {"x": draw(16, 784), "labels": torch.arange(16) % 10}
    report = examine(model.eval(), batch, gradients=True, batch_statistics=True)
    assert report.about["gradients"] == "the model's own loss"
    twin = copy.deepcopy(model).train()
    twin(**batch)["loss"].backward()
    found = {row.part: row.value for row in report.rows if row.metric == "gradient_norm"}
    expected = {name: float(p.grad.norm()) for name, p in twin.named_parameters()}
    assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_gradients_of_every_layer_with_the_statistics_of_the_batch_leave_no_trace():
    model = sequential(3, norm=True)
    before = copy.deepcopy(model.state_dict())
    report = examine(model, draw(16, 784), gradients=True, batch_statistics=True)
    gains = {row.layer: row.value for row in report.rows if row.metric == "gradient_gain"}
    assert sorted(gains) == [0, 1, 2, 3, 4]
    assert gains[4] == 1
    assert all(value > 0 for value in gains.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
