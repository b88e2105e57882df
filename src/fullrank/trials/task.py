"""A task for a given model: of the kind that it reads, with a loss that chance gives and batches without end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.errors import FullrankError, TrialError
from fullrank.spec.subject import device_of
from fullrank.trials.images import CLASSES, Part, images, is_of_digits
from fullrank.trials.language import Language
from fullrank.trials.main_input import Feed, feed_of
from fullrank.trials.objective import Example, Objective, TargetLoss, outputs
from fullrank.trials.readout import Readout
from fullrank.trials.sequences import run
from fullrank.trials.symbols import answers, longest, vectors, words

__all__ = ["Task", "task_for"]

TOKENS = 32
_STREAMS: dict[Part, str] = {"training": "True", "choosing": "choosing", "held out": "False"}
RIDDLES = (0.6, 0.3)  # what a network that sees everything learns of its neighbours in so few steps is little


class _Draw(Protocol):
    def __call__(self, seed: int, count: int, size: int, *, part: Part) -> Iterable[tuple[Any, Tensor]]: ...


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        name: in few words.
        sentence: what is to be said of what.
        chance: the loss of who knows nothing of the input, in nats.
        own: the loss of who knows a token and not its neighbours; None where there is no such.
        floor: no loss is lower; None where that is not known.
        objective: what the loss is, with a readout where the model has no head of its own.
        draw: batches and their answers, from a seed.
        device: where batches are put.
    """

    name: str
    sentence: str
    chance: float
    own: float | None
    floor: float | None
    objective: Objective
    draw: _Draw
    device: torch.device

    def batches(self, seed: int, count: int, size: int = 16, *, part: Part = "training") -> list[Example]:
        """Batches, the same for the same seed; those of another part are other ones.

        Args:
            seed: of all of them.
            count: how many.
            size: sequences in each.
            part: what they are for: training, choosing a learning rate, or held out.

        Returns:
            The batches.

        Raises:
            TrialError: for a size or a count below 1.
        """
        for name, value in (("size", size), ("count", count)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TrialError(f"{name}={value!r}; a task's batches need a whole number of at least 1.")
        made = self.draw(seed, count, size, part=part)
        return [Example(_moved(batch, self.device), targets.to(self.device)) for batch, targets in made]


def task_for(model: nn.Module, batch: Any, *, seed: int = 0) -> Task:
    """The built-in task that fits a model, seen from a batch that it takes and from what it returns.

    Token ids and vectors become the language of `trials.language`: a model that reads from left to right says the next
    symbol; one that sees whole sequences says of each symbol what follows from it and the one before; one that says one
    thing for a sequence says which symbol is in it most. Images become handwritten digits, or drawn shapes where
    scikit-learn is missing. A model that returns states and no logits gets a linear readout, drawn from the seed.

    Costs three forwards of two sequences. Nothing of the model changes.

    Args:
        model: any that `examine` takes.
        batch: a mapping, a tuple or a tensor that it can be called with.
        seed: of the language and the readout.

    Returns:
        The task.

    Raises:
        TrialError: where no task fits.
    """
    feed = feed_of(model, batch)
    device = device_of(model)
    with undisturbed(model):
        return _images(model, feed, seed, device) if feed.kind == "pixels" else _symbols(model, feed, seed, device)


def _images(model: nn.Module, feed: Feed, seed: int, device: torch.device) -> Task:
    channels, height, width = feed.shape[1:]
    shape = (channels, height, width)
    X, _ = images(seed, 2, shape=shape, classes=2, part="training")
    found, head = _seen(model, feed.call(X.to(device)))
    classes = min(CLASSES, found.shape[-1]) if head else CLASSES
    readout = None if head else Readout(found.shape[-1], classes, seed, found)

    def draw(seed: int, count: int, size: int, *, part: Part) -> Iterable[tuple[Any, Tensor]]:
        X, y = images(seed, count * size, shape=shape, classes=classes, part=part)
        return ((feed.call(X[at : at + size]), y[at : at + size]) for at in range(0, len(X), size))

    kind = "digits" if is_of_digits() else "shapes"
    sentence = f"which of {classes} classes of {kind} an image is of"
    return Task(kind, sentence, math.log(classes), None, 0.0, TargetLoss(readout, feed.tokens_first), draw, device)


def _symbols(model: nn.Module, feed: Feed, seed: int, device: torch.device) -> Task:
    tokens = max(4, min(TOKENS, feed.shape[1] if feed.kind == "vectors" else longest(model, feed.shape[1])))
    dress, symbols = vectors(feed, tokens, seed) if feed.kind == "vectors" else words(model, seed)
    language = Language(symbols, seed=seed)
    probe = torch.randint(symbols, (2, tokens), generator=torch.Generator().manual_seed(seed))
    call = partial(_call, feed, dress)
    found, head = _seen(model, _moved(call(probe), device))
    found = found.transpose(0, 1) if feed.tokens_first and found.ndim == 3 else found
    if head and found.shape[-1] < 2:
        raise TrialError("the model's head has a single output, and the built-in tasks tell classes apart; pass data.")
    if found.ndim == 2 or found.shape[1] < tokens:
        return _topic(feed, dress, language, tokens, found, head, seed, device)
    spoken = answers(dress, symbols, found.shape[-1], feed, head=head)
    own = head and spoken is not None
    readout = None if own else Readout(found.shape[-1], symbols, seed, found)
    said = torch.arange(symbols) if spoken is None else spoken
    if feed.seconds:
        levels, name, sentence, ahead = language.of_text, "text", "the next symbol of the text being read", True
    elif _reads_on(model, call, probe, found, device, feed.tokens_first):
        levels, name, sentence, ahead = language.of_text, "text", "the next symbol", True
    else:
        language = Language(symbols, *RIDDLES, seed=seed)
        levels, name, ahead = language.of_riddles, "riddles", False
        sentence = "what follows from each symbol and the one before it"

    def one(generator: torch.Generator, size: int) -> tuple[Any, Tensor]:
        if ahead:
            text = language.text(size, tokens + 1, generator)
            x, y = text[:, :-1], text[:, 1:]
        else:
            x, y = language.riddles(size, tokens, generator)
        return call(x), said[y]

    floor = 0.0 if feed.seconds else levels.both
    return Task(
        name,
        sentence,
        levels.chance,
        levels.own,
        floor,
        TargetLoss(readout, feed.tokens_first),
        partial(_drawn, one),
        device,
    )


def _topic(
    feed: Feed,
    dress: Callable[[Tensor], Tensor],
    language: Language,
    tokens: int,
    found: Tensor,
    head: bool,
    seed: int,
    device: torch.device,
) -> Task:
    classes = min(language.symbols, found.shape[-1]) if head else language.symbols
    readout = None if head else Readout(found.shape[-1], classes, seed, found)

    def one(generator: torch.Generator, size: int) -> tuple[Any, Tensor]:
        y = torch.randint(classes, (size,), generator=generator)
        x = torch.randint(language.symbols, (size, tokens), generator=generator)
        often = torch.rand((size, tokens), generator=generator) < 0.3
        return _call(feed, dress, torch.where(often, y[:, None], x)), y

    sentence = f"which of {classes} symbols a sequence holds most of"
    return Task(
        "topic",
        sentence,
        math.log(classes),
        None,
        0.0,
        TargetLoss(readout, feed.tokens_first),
        partial(_drawn, one),
        device,
    )


def _drawn(
    one: Callable[[torch.Generator, int], tuple[Any, Tensor]], seed: int, count: int, size: int, *, part: Part
) -> Iterator[tuple[Any, Tensor]]:
    """Batches from generators of their own, so that fewer of them are the first of more."""
    for index in range(count):
        told = hashlib.blake2b(f"{seed} {index} {_STREAMS[part]}".encode(), digest_size=6).digest()
        yield one(torch.Generator().manual_seed(int.from_bytes(told)), size)


def _call(feed: Feed, dress: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    content = dress(x)
    return feed.call(content, content if feed.seconds else None)


def _seen(model: nn.Module, batch: Any) -> tuple[Tensor, bool]:
    """What the model returns, and whether it is logits of a head rather than states."""
    try:
        output = run(model, batch)
    except Exception as reason:
        if isinstance(reason, FullrankError):
            raise
        said = str(reason).strip().splitlines() or [type(reason).__name__]
        raise TrialError(
            f"{type(model).__name__} cannot be called with what the built-in task gives it, which is "
            f"{_named(batch)} alone ({said[0].rstrip('.')}); pass data=."
        ) from reason
    found = outputs(output)
    if found is None:
        raise TrialError(f"{type(model).__name__} returns neither logits nor states, so that no task fits; pass data.")
    named = getattr(output, "logits", None) is found
    return found, named or _has_head(model, found)


def _named(batch: Any) -> str:
    return " and ".join(map(str, batch)) if isinstance(batch, Mapping) else "one tensor"


def _has_head(model: nn.Module, found: Tensor) -> bool:
    """Of plain code: whether what it returns has one entry for each word that it reads."""
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    return not hasattr(model, "config") and found.shape[-1] in sizes


def _reads_on(
    model: nn.Module,
    call: Callable[[Tensor], Any],
    probe: Tensor,
    found: Tensor,
    device: torch.device,
    tokens_first: bool,
) -> bool:
    """Whether other symbols in the second half change nothing in the first."""
    half = probe.shape[1] // 2
    other = probe.clone()
    other[:, half:] = (other[:, half:] + 1) % int(probe.max() + 1)
    changed = outputs(run(model, _moved(call(other), device)))
    assert changed is not None
    changed = changed.transpose(0, 1) if tokens_first else changed
    scale = (found - changed)[:, half:].abs().max()
    return bool((found - changed)[:, :half].abs().max() <= 1e-5 * scale)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch
