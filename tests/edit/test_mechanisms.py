"""Why edits are what they are: the ways to change a forward, tried on one small network.

Each candidate doubles what one attention module returns. What it survives is asserted as it was found, so that a
version of torch in which it is otherwise is noticed.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fullrank.edit.forwards import Enclosed


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        q, k, v = (y.view(2, 5, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.h = nn.ModuleList(Attention() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.h:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def double(output):
    return output * 2


def double_hook(module, args, output):
    return output * 2


def hook(module: nn.Module, net: Net) -> Callable[[], None]:
    return module.register_forward_hook(double_hook).remove


class Doubled(Attention):
    def forward(self, x):
        return super().forward(x) * 2


def class_swap(module: nn.Module, net: Net) -> Callable[[], None]:
    module.__class__ = Doubled
    return lambda: setattr(module, "__class__", Attention)


def closure(module: nn.Module, net: Net) -> Callable[[], None]:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2
    return lambda: delattr(module, "forward")


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


def wrapper(module: nn.Module, net: Net) -> Callable[[], None]:
    net.h[0] = Wrapper(module)
    return lambda: net.h.__setitem__(0, module)


class DoubledWeight(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrization(module: nn.Module, net: Net) -> Callable[[], None]:
    parametrize.register_parametrization(module.o, "weight", DoubledWeight())
    return lambda: parametrize.remove_parametrizations(module.o, "weight", leave_parametrized=False)


class DoubledAttention(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is functional.scaled_dot_product_attention:
            self.seen += 1
            return output * 2 if self.seen == 1 else output
        return output


def mode_outside(module: nn.Module, net: Net) -> Callable[[], None]:
    # around each forward of the model, as a context manager of a user's would be
    forward = type(net).forward

    def run(x):
        with DoubledAttention():
            return forward(net, x)

    net.forward = run
    return lambda: delattr(net, "forward")


class DoubledInside:
    what = "double"

    def __call__(self, forward, run, args, kwargs, /) -> Any:
        with DoubledAttention():
            return run(*args, **kwargs)


def ours(module: nn.Module, net: Net) -> Callable[[], None]:
    return Enclosed(module, DoubledInside()).undo


WAYS = (hook, class_swap, closure, wrapper, parametrization, mode_outside, ours)


def drawn(**options: Any) -> tuple[Net, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(**options).double(), torch.randn(2, 5, 8).double()


def close(one, other) -> bool:
    return torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_do_the_same_and_can_be_undone(way):
    net, x = drawn()
    base = net(x)
    attention = net.h[0](x) * 2 + x
    undo = way(net.h[0], net)
    assert close(net(x), attention + net.h[1](attention))
    undo()
    assert torch.equal(net(x), base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "follows"),
    [(way, way is not hook) for way in WAYS if way is not mode_outside],
)
def test_a_compiled_model_does_not_notice_hooks_that_come_later(way, follows):
    torch._dynamo.reset()
    net, x = drawn()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(x), net(x))
        undo = way(net.h[0], net)
        assert close(compiled(x), net(x)) is follows
        undo()
        torch._dynamo.reset()
        undo = way(net.h[0], net)
        assert close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
        undo()
    torch._dynamo.reset()


@pytest.mark.parametrize(("way", "right"), [(way, way is not mode_outside) for way in WAYS])
def test_a_mode_that_is_over_before_the_backward_pass_gives_wrong_gradients_under_checkpointing(way, right):
    gradients = []
    for checkpointed in (False, True):
        net, x = drawn(checkpointed=checkpointed)
        way(net.h[0], net)
        try:
            net(x).square().sum().backward()
        except torch.utils.checkpoint.CheckpointError:  # it notices: what is computed again has another shape
            gradients.append([])
            continue
        gradients.append([p.grad for p in net.parameters()])
    same = len(gradients[1]) > 0 and all(close(a, b) for a, b in zip(*gradients, strict=True))
    assert same is right


@pytest.mark.parametrize(("way", "right"), [(way, way not in (closure, mode_outside)) for way in WAYS])
def test_a_copy_of_a_closure_runs_on_the_weights_of_the_original(way, right):
    net, x = drawn()
    way(net.h[0], net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        edited = net(x)
        for parameter in other.parameters():
            parameter.zero_()
        if way is mode_outside:
            assert close(other(x), edited)
            return
        assert close(other(x), x) is right


@pytest.mark.parametrize(("way", "same"), [(way, way not in (wrapper, parametrization)) for way in WAYS])
def test_wrappers_and_parametrizations_change_names(way, same):
    net, _ = drawn()
    names = list(net.state_dict())
    undo = way(net.h[0], net)
    assert (list(net.state_dict()) == names) is same
    undo()
    assert sorted(net.state_dict()) == sorted(names)


@pytest.mark.parametrize(("way", "can"), [(way, way not in (closure, mode_outside, parametrization)) for way in WAYS])
def test_closures_and_parametrizations_are_not_pickled(way, can):
    net, x = drawn()
    way(net.h[0], net)
    if not can:
        with pytest.raises((AttributeError, RuntimeError, pickle.PicklingError)):
            pickle.dumps(net)
        return
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_removing_a_parametrization_alone_changes_the_order_of_parameters():
    # an optimiser's state is stored by that order; `fullrank.edit.reparametrize` puts it back
    net = nn.Linear(2, 2)
    parametrize.register_parametrization(net, "weight", DoubledWeight())
    parametrize.remove_parametrizations(net, "weight", leave_parametrized=False)
    assert [name for name, _ in net.named_parameters()] == ["bias", "weight"]


def test_classes_that_are_swapped_twice_must_be_put_back_in_order():
    net, x = drawn()
    module = net.h[0].o
    family = type(module)

    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    module.__class__ = Twice
    parametrize.register_parametrization(module, "weight", DoubledWeight())  # which swaps the class as well
    module.__class__ = family  # undoing the first alone takes the second's away
    with pytest.raises(AttributeError, match="weight"):
        net(x)
