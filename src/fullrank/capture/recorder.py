"""Feeding observers from any forward of a model, without changing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from fullrank.capture.adapters import with_virtual_tokens
from fullrank.capture.anatomy import Anatomy
from fullrank.capture.dispatch import overriding
from fullrank.capture.documents import Documents
from fullrank.capture.events import Event, Observer, Signal
from fullrank.capture.gradients import End, GradientWatch
from fullrank.capture.own_copy import own_copy
from fullrank.capture.reference import module_names, reference_path
from fullrank.capture.residual import is_norm
from fullrank.capture.scene import Scene
from fullrank.capture.survey import survey
from fullrank.capture.tap import Tap, recomputing
from fullrank.capture.tensors import first_state, stream_input
from fullrank.capture.undisturbed import undisturbed
from fullrank.errors import ModelError

__all__ = ["Recorder"]

Progress = Callable[[str, int, int], None]
"""Called after each block with the stack, the layer and how many layers the stack has."""


class Recorder:
    """Inside its `with` block, any forward of the model feeds the observers.

    Outputs of the model stay the same bit for bit: it runs its own kernels, in the same order. On leaving, hooks,
    dispatch tables, the fast-path flag and the compiler's stance are as they were, whatever happened inside.
    Parameters, training flags and random state are not touched (to look in evaluation mode, enter `undisturbed` first).

    Within a block call, attention calls come as they happen, then what the norms handed on and the state between
    attention and MLP, then the block's output.

    Args:
        model: the model.
        observers: what takes the events; nothing is attached that none of them needs.
        anatomy: what `survey` found; by default the first forward is run once more before, to survey it.
        real: (sequences, tokens) bool, the tokens that are not padding; a mapping of stack names to such. One tensor is
            taken for every stack that has this many sequences and tokens; for an encoder, not for the decoder that
            reads it, and for text, not for images.
        documents: how rows that hold several documents come apart; events then have one sequence per document.
        progress: called after each block.

    Attributes:
        notes: sentences about what was not seen, or seen on another path.
    """

    def __init__(
        self,
        model: nn.Module,
        observers: Sequence[Observer],
        *,
        anatomy: Anatomy | None = None,
        real: Tensor | Mapping[str, Tensor] | None = None,
        documents: Documents | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.observers = tuple(observers)
        self.notes: list[str] = []
        self._anatomy = anatomy
        self._real = with_virtual_tokens(model, real)
        self._documents = documents
        self._progress = progress
        self._needs: frozenset[Signal] = frozenset().union(*(observer.needs for observer in self.observers))
        self._put_back: ExitStack | None = None
        self._tap = Tap(self._on_call, self._on_unread)
        self._scene: Scene | None = None

    @property
    def anatomy(self) -> Anatomy:
        """What the survey found.

        Raises:
            ModelError: before the first forward, where none was given.
        """
        if self._anatomy is None:
            raise ModelError("anatomy is not known yet: no forward was run, and none was passed to the Recorder.")
        return self._anatomy

    def ends(self) -> list[End]:
        """The last states of the forward that has just run, with their history, for a backward of one's own."""
        return [] if self._scene is None else self._scene.ends()

    @property
    def watch(self) -> GradientWatch:
        """The hooks that wait for a backward.

        Raises:
            ModelError: where no observer looks at gradients.
        """
        if self._scene is None or self._scene.watch is None:
            raise ModelError("no observer of this Recorder needs the signal 'gradient'.")
        return self._scene.watch

    def emit(self, event: Event) -> None:
        """Hand an event on to the observers that look at gradients."""
        self._emit("gradient", event)

    def __enter__(self) -> Self:
        if self._put_back is not None:
            raise ModelError("this Recorder is already recording; make another one.")
        with ExitStack() as put_back:
            if self._anatomy is not None:
                self._attach(put_back)
            else:
                put_back.callback(
                    self.model.register_forward_pre_hook(partial(self._survey_first, put_back), with_kwargs=True).remove
                )
            self._put_back = put_back.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        put_back, self._put_back = self._put_back, None
        if put_back is not None:
            put_back.close()
        if self._scene is not None:
            self._scene.close()
        if self._documents is not None:
            self._documents.clear()
            self.notes.extend(note for note in self._documents.notes if note not in self.notes)

    # ------------------------------------------------------------ attaching

    def _survey_first(
        self, put_back: ExitStack, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._anatomy is not None or self._put_back is None:
            return
        handle = self._put_back.pop_all()  # this hook must not see its own survey
        handle.close()
        with undisturbed(model):
            own_args, own_kwargs = map(own_copy, args), {name: own_copy(value) for name, value in kwargs.items()}
            self._anatomy = survey(model, lambda: model(*own_args, **own_kwargs))
        self._attach(self._put_back)
        self._begin()

    def _attach(self, put_back: ExitStack) -> None:
        anatomy = self.anatomy
        self.notes.extend(anatomy.notes)
        self._scene = Scene(anatomy, self._tap, self._needs, self._real, self._emit, self.notes)
        names = module_names(self.model)
        modules = {name: module for module, name in names.items()}
        stack_of = {path: index for index, stack in enumerate(anatomy.stacks) for path in stack.paths}
        missing = [path for path in stack_of if path not in modules]
        if missing:
            raise ModelError(f"anatomy names {missing[0]!r}, which this {type(self.model).__name__} does not have.")
        notes: list[str] = []
        self._tap.stance = put_back.enter_context(reference_path(self.model, notes))
        self.notes.extend(note for note in notes if note not in self.notes)
        put_back.callback(self.model.register_forward_pre_hook(lambda *_: self._begin()).remove)
        deep = bool(self._needs & {"mid", "read", "attention", "gradient"})
        for module, name in names.items():
            block = stack_of.get(name)
            if block is not None and anatomy.stacks[block].end is not None:
                begin = partial(self._begin_layer, block, name)
                put_back.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            elif block is not None:
                enter, leave = partial(self._enter_block, block, name), self._leave_block
                put_back.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                put_back.callback(module.register_forward_hook(leave, always_call=True).remove)
            if deep:
                put_back.callback(module.register_forward_pre_hook(partial(self._enter_module, name)).remove)
                # prepended: the innermost module must be left before its block is
                leave_module = module.register_forward_hook(self._leave_module, always_call=True, prepend=True)
                put_back.callback(leave_module.remove)
        self._attach_ends(put_back, modules)
        if deep:
            put_back.enter_context(overriding(self.model, self._tap))
            put_back.enter_context(self._tap)

    def _attach_ends(self, put_back: ExitStack, modules: Mapping[str, nn.Module]) -> None:
        for stack in self.anatomy.stacks:
            if stack.end is None:
                continue
            if stack.ends_inside:
                ended = modules[stack.end].register_forward_hook(self._end_inside, always_call=True)
            else:
                ended = modules[stack.end].register_forward_pre_hook(self._end_before, with_kwargs=True)
            put_back.callback(ended.remove)

    # ------------------------------------------------------------ hooks

    def _idle(self) -> bool:
        return self._scene is None or self._tap.busy or recomputing() or torch.compiler.is_compiling()

    def _begin(self) -> None:
        if self._scene is not None and not self._idle():
            self._scene.begin()

    def _enter_block(
        self, stack: int, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._idle() and self._scene is not None:
            self._scene.enter_block(stack, path, args, kwargs)

    def _begin_layer(
        self, stack: int, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A layer of weights: what it is given is also what the layer before it ends with."""
        self._end_before(module, args, kwargs)
        self._enter_block(stack, path, module, args, kwargs)

    def _end_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._idle() and self._scene is not None:
            self._tell(self._scene.end_block(stream_input(args, kwargs)))

    def _end_inside(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._idle() and self._scene is not None:
            self._tell(self._scene.end_block(first_state(output)))

    def _tell(self, place: tuple[str, int, int] | None) -> None:
        if self._progress is not None and place is not None:
            with self._tap.silent():
                self._progress(*place)

    def _leave_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._idle() or self._scene is None:
            return
        self._tell(self._scene.leave_block(first_state(output)))

    def _enter_module(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._idle() and self._scene is not None:
            self._scene.modules.append((path, module))

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._idle() or self._scene is None:
            return
        if self._scene.modules and self._scene.modules[-1][1] is module:
            self._scene.modules.pop()
        if self._tap.traces and args and is_norm(module):
            self._tap.traces[-1].see_norm(args[0], output)

    def _on_call(self, call: Any) -> None:
        if self._scene is not None:
            self._scene.attend(call)

    def _on_unread(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _emit(self, signal: Signal, event: Event) -> None:
        """Observers run without gradients and unseen: what they compute is no part of the model."""
        with torch.no_grad(), self._tap.silent():
            if self._documents is not None:
                event = self._documents.apart(event)
            for observer in self.observers:
                if signal in observer.needs:
                    observer.see(event)
