"""What the capture tests share: an observer that keeps everything, and models of every kind, small and random."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture import AttentionCall, Event, Recorder, Signal, StreamState, survey
from fullrank.table import Row

ALL: frozenset[Signal] = frozenset({"stream", "mid", "read", "attention"})


class Keep:
    """An observer that keeps a copy of every event."""

    def __init__(self, needs: frozenset[Signal] = ALL) -> None:
        self.needs = needs
        self.events: list[Event] = []

    def see(self, event: Event) -> None:
        self.events.append(event)

    def rows(self) -> list[Row]:
        return []

    def merge(self, other: Keep) -> None:
        self.events.extend(other.events)

    @property
    def calls(self) -> list[AttentionCall]:
        return [event for event in self.events if isinstance(event, AttentionCall)]

    def states(self, site: str = "stream", part: str = "out", stack: str | None = None) -> dict[int, Tensor]:
        return {
            event.layer: event.value
            for event in self.events
            if isinstance(event, StreamState)
            and (event.site, event.part) == (site, part)
            and stack in (None, event.stack)
        }


@dataclass
class Case:
    """A model, what it is called with, and where its attention output leaves the heads."""

    model: nn.Module
    batch: dict[str, Any]
    blocks: dict[str, list[str]]  # stack name → block paths
    heads: dict[str, int]
    projections: dict[tuple[str, str], str]  # (stack, part) → path inside a block of the module after the kernel
    causal: frozenset[str] = frozenset()
    kernel: str | None = "scaled_dot_product_attention"  # None where there is no attention over tokens
    with_mid: bool = True
    with_read: bool = True
    with_read_mid: bool = True  # beside both of the above
    says: tuple[str, ...] = ()  # parts of notes that tell what was not seen
    of_stack: dict[str, dict[str, Any]] = field(default_factory=dict)  # what differs; with_mid may list the layers

    def expected(self, stack: str, name: str) -> Any:
        return self.of_stack.get(stack, {}).get(name, getattr(self, name))

    def run(self) -> Any:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some draw which patches they look at
            return self.model(**self.batch)


def record(model: nn.Module, forward: Callable[[], Any], **options: Any) -> tuple[Keep, Recorder, Any]:
    """Survey, then record one forward."""
    keep = Keep()
    anatomy = survey(model, forward)
    with Recorder(model, [keep], anatomy=anatomy, **options) as recorder:
        output = forward()
    return keep, recorder, output


@contextlib.contextmanager
def plain_hooks(model: nn.Module, names: list[str], *, inputs: bool = False):
    """What modules got or returned, by ordinary hooks: the twin of the recorder."""
    seen: list[tuple[str, Tensor]] = []
    modules = dict(model.named_modules())

    def first(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else value[0]

    handles = []
    for name in dict.fromkeys(names):
        if inputs:
            handles.append(
                modules[name].register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: seen.append(
                        (name, (args[0] if args else kwargs["hidden_states"]).clone())
                    ),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(
                modules[name].register_forward_hook(
                    lambda module, args, output, name=name: seen.append((name, first(output).clone()))
                )
            )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in tensors(item)]
    return []


def assert_identical(one: Any, other: Any) -> None:
    """Bit for bit."""
    a, b = tensors(one), tensors(other)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
