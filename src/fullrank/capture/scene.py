"""Where in a forward the model is, and the events that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy
from fullrank.capture.calls import KernelCall
from fullrank.capture.events import AttentionCall, Event, GradientState, Signal, StreamState
from fullrank.capture.factors import Factors
from fullrank.capture.gradients import End, GradientWatch
from fullrank.capture.layout import Layout
from fullrank.capture.marks import bit_of
from fullrank.capture.padding import RealTokens
from fullrank.capture.reading import MaskReader, Unreadable, read
from fullrank.capture.residual import Followed, ResidualTrace
from fullrank.capture.tap import Tap, heads_of
from fullrank.capture.tensors import is_handed_on, stream_input
from fullrank.capture.tokens import over_tokens

__all__ = ["Scene"]


@dataclass(eq=False)
class _Block:
    """One block call that is running."""

    stack: int
    layer: int
    path: str
    stream: Tensor | None
    follows: bool  # the stream is what the layer before returned
    trace: ResidualTrace | None
    depth: int
    live: bool  # gradients are on
    counts: dict[str, int] = field(default_factory=lambda: {"self": 0, "cross": 0})


class Scene:
    """Counts block calls, names places, and makes events of what the hooks and the tap see.

    Args:
        anatomy: the stacks.
        tap: sees the functions.
        needs: which signals are wanted.
        real: which tokens are real, as given to the recorder.
        emit: takes an event and the signal it belongs to.
        notes: gets sentences about what could not be seen.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tap: Tap,
        needs: frozenset[Signal],
        real: Tensor | Mapping[str, Tensor] | None,
        emit: Callable[[Signal, Event], None],
        notes: list[str],
    ) -> None:
        self.modules: list[tuple[str, nn.Module]] = []
        self._anatomy = anatomy
        self._tap = tap
        self._needs = needs
        self._real = RealTokens(anatomy, real)
        self._emit = emit
        self._notes = notes
        self._masks = MaskReader()
        self._running: list[_Block] = []
        self._layers = [0] * len(anatomy.stacks)
        self._handed_on: list[Tensor | None] = [None] * len(anatomy.stacks)
        self._without_mid: dict[int, bool] = {}
        self._ends: dict[int, End] = {}
        self._live = False  # gradients were on when the forward began
        self.watch: GradientWatch | None = None
        if "gradient" in needs:
            self.watch = GradientWatch(lambda event: self._emit("gradient", event))
            tap.factors = Factors()

    def begin(self) -> None:
        """A forward of the whole model begins: layers count from 1 again."""
        self._live = self.watch is not None and torch.is_grad_enabled()
        self._layers = [0] * len(self._layers)
        self._handed_on = [None] * len(self._handed_on)
        self._running.clear()
        self.modules.clear()
        self._tap.traces.clear()
        self._tap.marks.clear()
        self._tap.softmaxes.take_unused()
        self._masks.clear()
        self._ends.clear()
        if self.watch is not None:
            self.watch.begin()
        if self._tap.factors is not None:
            self._tap.factors.clear()

    def close(self) -> None:
        """Let go of all tensors and say which stacks had no state between attention and MLP."""
        self.begin()
        if self.watch is not None:
            self.watch.close()
        names = [self._anatomy.stacks[index].name for index, without in self._without_mid.items() if without]
        if names and "mid" in self._needs:
            self._note(
                f"no state between attention and MLP could be told in {', '.join(names)}: the two are parallel, or the "
                "additions around them cannot be followed."
            )

    def ends(self) -> list[End]:
        """The last states of the forward that has just run, with their history, in the order of the stacks."""
        read = 0
        for index, end in self._ends.items():
            read |= self._tap.marks.of(end.value) & ~bit_of(index)
        return [replace(end, into=bool(read & bit_of(index))) for index, end in sorted(self._ends.items())]

    # ------------------------------------------------------------ blocks

    def enter_block(self, stack: int, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is called."""
        stream = stream_input(args, kwargs, self._anatomy.stacks[stack].at)
        paths = self._anatomy.stacks[stack].paths
        if self._layers[stack] >= len(paths):
            self._layers[stack] = 0  # part of the model was called alone, as when text is generated
            self._handed_on[stack] = None
        self._layers[stack] += 1
        layer = self._layers[stack]
        follows = layer == 1 or is_handed_on(self._handed_on[stack], stream)
        follow = stream is not None and self._needs & {"mid", "read"} and self._anatomy.stacks[stack].over == "tokens"
        trace = ResidualTrace(stream) if stream is not None and follow else None
        live = self.watch is not None and torch.is_grad_enabled()
        block = _Block(stack, layer, path, stream, follows, trace, len(self.modules), live)
        self._running.append(block)
        if trace is not None:
            self._tap.traces.append(trace)
        if stream is None:
            self._note(f"block {path} is not called with a tensor that could be its stream.")
            return
        self._tap.marks.enter(stream, bit_of(stack), args, kwargs)
        if self._tap.factors is not None:
            self._tap.factors.inside = live
        if layer == 1:
            if live and self.watch is not None:
                self.watch.wake(stream)
            self._state("stream", block, 0, "stream", "out", stream)

    def end_block(self, output: Tensor | None) -> tuple[str, int, int] | None:
        """A block without a call of its own ends here, if one is running: with what the next layer of weights is given.

        Returns:
            As `leave_block`.
        """
        running = self._running[-1] if self._running else None
        if running is None or self._anatomy.stacks[running.stack].end is None:
            return None
        return self.leave_block(output)

    def leave_block(self, output: Tensor | None) -> tuple[str, int, int] | None:
        """A block returns, or is left by an exception (then the output is None).

        Returns:
            The stack, the layer and how many layers there are, or None where no block was running.
        """
        if not self._running:
            return None
        block = self._running.pop()
        if block.trace is not None:
            self._tap.traces.remove(block.trace)
        if self._tap.factors is not None and not self._running:
            self._tap.factors.clear()
        stack = self._anatomy.stacks[block.stack]
        self._handed_on[block.stack] = output
        if output is None:
            return None
        self._report_unused(block)
        if block.trace is not None:
            self._followed(block, block.trace.finish(output))
        self._state("stream", block, block.layer, "stream", "out", output)
        return stack.name, block.layer, len(stack.paths)

    def _followed(self, block: _Block, followed: Followed) -> None:
        if block.follows and followed.read_input is not None:
            self._state("read", block, block.layer - 1, "read", "out", followed.read_input)
        attends = block.trace is not None and block.trace.attention > 0
        if attends:
            missing = self._without_mid.get(block.stack, True)
            self._without_mid[block.stack] = missing and followed.mid is None
        if followed.mid is not None:
            self._state("mid", block, block.layer, "stream", "mid", followed.mid, live=followed.live_mid)
        if followed.read_mid is not None:
            self._state("read", block, block.layer, "read", "mid", followed.read_mid)

    def _state(
        self,
        signal: Signal,
        block: _Block,
        layer: int,
        site: str,
        part: str,
        value: Tensor,
        live: Tensor | None = None,
    ) -> None:
        if signal not in self._needs and (self.watch is None or signal == "read"):
            return
        stack = self._anatomy.stacks[block.stack]
        live = value if live is None else live
        found = stack.layout.tokens(value.detach())
        if found is None:
            self._note(
                f"the stream of {stack.name} has the shape {tuple(value.shape)}: which axis holds tokens is not known."
            )
            return
        real = self._real.of(stack, found.shape[0], found.shape[1], found.device)
        if signal in self._needs:
            state = StreamState(stack.name, layer, site, part, block.path, found, real, stack.over)  # type: ignore[arg-type]
            self._emit(signal, state)
        if self.watch is not None and site == "stream":
            self._watch_state(block, layer, part, live, value.shape, real)

    def _watch_state(
        self, block: _Block, layer: int, part: str, live: Tensor, shape: torch.Size, real: Tensor | None
    ) -> None:
        if not block.live and not self._live:
            return
        stack = self._anatomy.stacks[block.stack]
        assert self.watch is not None
        event = GradientState(stack.name, layer, part, block.path, "state", None, real)
        self.watch.state(event, live, partial(_tokens, stack.layout, shape))
        if part == "out" and layer == len(stack.paths) and live.requires_grad:
            version = -1 if live.is_inference() else live._version
            self._ends[block.stack] = End(stack, live, real, version)

    # ------------------------------------------------------------ attention

    def attend(self, call: KernelCall) -> None:
        """An attention kernel was called."""
        if not self._needs & {"attention", "gradient"}:
            return
        path = self.modules[-1][0] if self.modules else ""
        if not self._running or self._running[-1].stream is None:
            self._note(f"attention in {path or 'the model'}, outside of the blocks, is not reported.")
            return
        if call.weights is not None and path in self._anatomy.apart:
            return  # the survey has said why
        block = self._running[-1]
        stack = self._anatomy.stacks[block.stack]
        heads = self._heads(block)
        stream = block.stream
        assert stream is not None
        if not over_tokens(call, stream.shape, heads, stack.layout):
            self._note(f"a call of {call.kernel} in {path} is not attention over tokens (channels, experts or heads).")
            return
        batch, _, _ = stack.layout.sizes(stream.shape)
        try:
            reading = read(call, batch, heads=heads, masks=self._masks)
        except Unreadable as reason:
            self._note(f"attention in {path} was not read: {reason}.")
            return
        kind = self._kind(call, block)
        count = block.counts[kind]
        block.counts[kind] += 1
        queries, keys = self._real.of_call(call, reading, stack, kind)
        event = AttentionCall(
            stack=stack.name,
            layer=block.layer,
            part=f"{kind}.{count}" if count else kind,
            path=path,
            attention=reading.attention,
            value=reading.value,
            real_queries=queries,
            real_keys=keys,
            causal=reading.causal,
            kernel=call.kernel,
            dtype=call.dtype,
        )
        if "attention" in self._needs:
            self._emit("attention", event)
        if self.watch is not None and self._live:
            made = GradientState(stack.name, block.layer, event.part, path, "q", None, queries)
            self.watch.attention(made, call, batch, heads, keys, enabled=block.live)

    def _kind(self, call: KernelCall, block: _Block) -> str:
        if call.sources:
            return "self" if call.sources & bit_of(block.stack) else "cross"
        # values from a cache have no sources in this forward: the survey saw the same call without one
        surveyed = self._anatomy.stacks[block.stack].calls[block.layer - 1]
        index = sum(block.counts.values())
        return surveyed[index].split(".")[0] if index < len(surveyed) else "self"

    def _heads(self, block: _Block) -> int | None:
        inside = self.modules[block.depth :] or self.modules
        return next((found for _, module in reversed(inside) if (found := heads_of(module))), None)

    def _report_unused(self, block: _Block) -> None:
        # of what is made of several maps the survey has said so
        apart = any(f"{path}.".startswith(f"{block.path}.") for path in self._anatomy.apart)
        for shape in self._tap.softmaxes.take_unused():  # always asked: it lets go of their inputs
            several = len(shape) > 2 and shape[-2] > 1
            if "attention" in self._needs and not apart and several and not any(block.counts.values()):
                name = self._anatomy.stacks[block.stack].name
                self._note(
                    f"a softmax in the blocks of {name} is not multiplied with values as a plain product: not reported."
                )

    def _note(self, sentence: str) -> None:
        if sentence not in self._notes:
            self._notes.append(sentence)


def _tokens(layout: Layout, shape: torch.Size, gradient: Tensor) -> Tensor:
    found = layout.tokens(gradient.reshape(shape))
    assert found is not None  # the state itself was laid out
    return found
