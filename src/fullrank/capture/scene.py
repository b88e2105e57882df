"""Where in a forward the model is, and the events that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.anatomy import Anatomy, Stack
from fullrank.capture.calls import KernelCall
from fullrank.capture.events import AttentionCall, Event, Signal, StreamState
from fullrank.capture.marks import OUTSIDE
from fullrank.capture.reading import MaskReader, Reading, Unreadable, read
from fullrank.capture.residual import Followed, ResidualTrace
from fullrank.capture.tap import Tap, heads_of
from fullrank.capture.tensors import stream_input
from fullrank.capture.tokens import over_tokens, tokens_and_batch

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
        self._real = real
        self._emit = emit
        self._notes = notes
        self._masks = MaskReader()
        self._running: list[_Block] = []
        self._layers = [0] * len(anatomy.stacks)
        self._handed_on: list[Tensor | None] = [None] * len(anatomy.stacks)
        self._without_mid: dict[int, bool] = {}

    def begin(self) -> None:
        """A forward of the whole model begins: layers count from 1 again."""
        self._layers = [0] * len(self._layers)
        self._handed_on = [None] * len(self._handed_on)
        self._running.clear()
        self.modules.clear()
        self._tap.traces.clear()
        self._tap.marks.clear()
        self._tap.softmaxes.take_unused()
        self._masks.clear()

    def close(self) -> None:
        """Let go of all tensors and say which stacks had no state between attention and MLP."""
        self.begin()
        names = [self._anatomy.stacks[index].name for index, without in self._without_mid.items() if without]
        if names and "mid" in self._needs:
            self._note(
                f"no state between attention and MLP could be told in {', '.join(names)}: the two are parallel, or the "
                "additions around them cannot be followed."
            )

    # ------------------------------------------------------------ blocks

    def enter_block(self, stack: int, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is called."""
        stream = stream_input(args, kwargs)
        paths = self._anatomy.stacks[stack].paths
        if self._layers[stack] >= len(paths):
            self._layers[stack] = 0  # part of the model was called alone, as when text is generated
            self._handed_on[stack] = None
        self._layers[stack] += 1
        layer = self._layers[stack]
        follows = layer == 1 or (stream is not None and self._handed_on[stack] is stream)
        trace = ResidualTrace(stream) if stream is not None and self._needs & {"mid", "read"} else None
        block = _Block(stack, layer, path, stream, follows, trace, len(self.modules))
        self._running.append(block)
        if trace is not None:
            self._tap.traces.append(trace)
        if stream is None:
            self._note(f"block {path} is not called with a tensor that could be its stream.")
            return
        self._tap.marks.enter(stream, _bit(stack), args, kwargs)
        if layer == 1:
            self._state("stream", block, 0, "stream", "out", stream)

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
            self._state("mid", block, block.layer, "stream", "mid", followed.mid)
        if followed.read_mid is not None:
            self._state("read", block, block.layer, "read", "mid", followed.read_mid)

    def _state(self, signal: Signal, block: _Block, layer: int, site: str, part: str, value: Tensor) -> None:
        if signal not in self._needs:
            return
        stack = self._anatomy.stacks[block.stack]
        value = value.detach()
        if value.ndim == 2:
            value = value.unsqueeze(0)
        elif value.ndim == 3 and stack.tokens_first:
            value = value.transpose(0, 1)
        elif value.ndim == 4 and stack.grid:
            value = value.flatten(1, 2)  # a grid of tokens
        elif value.ndim != 3:
            self._note(
                f"the stream of {stack.name} has the shape {tuple(value.shape)}: which axis holds tokens is not known."
            )
            return
        real = self._real_of(stack, value.shape[0], value.shape[1], value.device)
        self._emit(signal, StreamState(stack.name, layer, site, part, block.path, value, real))  # type: ignore[arg-type]

    # ------------------------------------------------------------ attention

    def attend(self, call: KernelCall) -> None:
        """An attention kernel was called."""
        if "attention" not in self._needs:
            return
        path = self.modules[-1][0] if self.modules else ""
        if not self._running or self._running[-1].stream is None:
            self._note(f"attention in {path or 'the model'}, outside of the blocks, is not reported.")
            return
        block = self._running[-1]
        stack = self._anatomy.stacks[block.stack]
        heads = self._heads(block)
        stream = block.stream
        assert stream is not None
        if not over_tokens(call, stream.shape, heads, tokens_first=stack.tokens_first):
            self._note(f"a call of {call.kernel} in {path} is not attention over tokens (channels, experts or heads).")
            return
        _, batch = tokens_and_batch(stream.shape, tokens_first=stack.tokens_first)
        try:
            reading = read(call, batch, heads=heads, masks=self._masks)
        except Unreadable as reason:
            self._note(f"attention in {path} was not read: {reason}.")
            return
        kind = self._kind(call, block)
        count = block.counts[kind]
        block.counts[kind] += 1
        queries, keys = self._real_tokens(call, reading, stack, kind)
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
        self._emit("attention", event)

    def _kind(self, call: KernelCall, block: _Block) -> str:
        if call.sources:
            return "self" if call.sources & _bit(block.stack) else "cross"
        # values from a cache have no sources in this forward: the survey saw the same call without one
        surveyed = self._anatomy.stacks[block.stack].calls[block.layer - 1]
        index = sum(block.counts.values())
        return surveyed[index].split(".")[0] if index < len(surveyed) else "self"

    def _heads(self, block: _Block) -> int | None:
        inside = self.modules[block.depth :] or self.modules
        return next((found for _, module in reversed(inside) if (found := heads_of(module))), None)

    def _report_unused(self, block: _Block) -> None:
        for shape in self._tap.softmaxes.take_unused():  # always asked: it lets go of their inputs
            if "attention" in self._needs and len(shape) > 2 and shape[-2] > 1 and not any(block.counts.values()):
                name = self._anatomy.stacks[block.stack].name
                self._note(
                    f"a softmax in the blocks of {name} is not multiplied with values as a plain product: not reported."
                )

    # ------------------------------------------------------------ padding

    def _real_of(self, stack: Stack, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        if isinstance(self._real, Mapping):
            real = self._real.get(stack.name)
        elif self._takes_tensor(stack):
            real = self._real
        else:
            real = None
        if real is None or tuple(real.shape) != (batch, tokens):
            return None
        return real.to(device=device, dtype=torch.bool)

    def _takes_tensor(self, stack: Stack) -> bool:
        """One mask belongs to the encoder rather than to the decoder that reads it, to text rather than to images."""
        crosses = any(part.startswith("cross") for parts in stack.calls for part in parts)
        return len(self._anatomy.stacks) == 1 or not (crosses or stack.name.startswith("vision"))

    def _real_tokens(
        self, call: KernelCall, reading: Reading, stack: Stack, kind: str
    ) -> tuple[Tensor | None, Tensor | None]:
        batch, _, queries, keys = reading.attention.shape
        device = reading.attention.device
        of_queries = self._real_of(stack, batch, queries, device)
        if kind == "self":
            of_keys = self._real_of(stack, batch, keys, device)
        else:
            sources = [s for i, s in enumerate(self._anatomy.stacks) if call.sources & _bit(i) and s is not stack]
            found = [real for s in sources if (real := self._real_of(s, batch, keys, device)) is not None]
            of_keys = found[0] if found else None
        if of_keys is None:
            of_keys = reading.seen_keys()
            if of_queries is None and kind == "self" and queries == keys:
                of_queries = of_keys
        return of_queries, of_keys

    def _note(self, sentence: str) -> None:
        if sentence not in self._notes:
            self._notes.append(sentence)


def _bit(stack: int) -> int:
    return OUTSIDE << (stack + 1)
