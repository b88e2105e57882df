"""A task for a given model: of the kind that it reads, with a loss that chance gives and batches without end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.errors import TrialError
from fullrank.spec.subject import device_of, first_option
from fullrank.trials.images import CLASSES, images, is_of_digits
from fullrank.trials.language import Language
from fullrank.trials.main_input import Feed, feed_of
from fullrank.trials.objective import Example, Objective, TargetLoss, outputs, run
from fullrank.trials.readout import Readout

__all__ = ["Task", "task_for"]

SYMBOLS = 16
TOKENS = 32
RIDDLES = (0.6, 0.3)  # what a network that sees everything learns of its neighbours in so few steps is little


class _Draw(Protocol):
    def __call__(self, one: int, size: int, *, train: bool) -> tuple[Any, Tensor]: ...


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
        draw: a batch and its answers, from a seed.
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

    def batches(self, seed: int, count: int, size: int = 16, *, train: bool = True) -> list[Example]:
        """Batches, the same for the same seed; those that are not for training are other ones.

        Args:
            seed: of all of them.
            count: how many.
            size: sequences in each.
            train: whether for training or held out.

        Returns:
            The batches.
        """
        made = []
        for index in range(count):
            told = f"{seed} {index} {train}".encode()
            one = int.from_bytes(hashlib.blake2b(told, digest_size=6).digest())
            batch, targets = self.draw(one, size, train=train)
            made.append(Example(_moved(batch, self.device), targets.to(self.device)))
        return made


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
    X, _ = images(seed, 2, shape=shape, classes=2, train=True)
    found, head = _seen(model, feed.call(X.to(device)))
    classes = min(CLASSES, found.shape[-1]) if head else CLASSES
    readout = None if head else Readout(found.shape[-1], classes, seed, found)

    def draw(one: int, size: int, *, train: bool) -> tuple[Any, Tensor]:
        X, y = images(one, size, shape=shape, classes=classes, train=train)
        return feed.call(X), y

    kind = "digits" if is_of_digits() else "shapes"
    sentence = f"which of {classes} classes of {kind} an image is of"
    return Task(kind, sentence, math.log(classes), None, 0.0, TargetLoss(readout, feed.tokens_first), draw, device)


def _symbols(model: nn.Module, feed: Feed, seed: int, device: torch.device) -> Task:
    tokens = max(4, min(TOKENS, feed.shape[1] if feed.kind == "vectors" else _longest(model, feed.shape[1])))
    dress, symbols = _vectors(feed, tokens, seed) if feed.kind == "vectors" else _words(model, seed)
    language = Language(symbols, seed=seed)
    probe = torch.randint(symbols, (2, tokens), generator=torch.Generator().manual_seed(seed))
    call = partial(_call, feed, dress)
    found, head = _seen(model, _moved(call(probe), device))
    found = found.transpose(0, 1) if feed.tokens_first and found.ndim == 3 else found
    if head and found.shape[-1] < 2:
        raise TrialError("the model's head has a single output, and the built-in tasks tell classes apart; pass data.")
    if found.ndim == 2 or found.shape[1] < tokens:
        return _topic(feed, dress, language, tokens, found, head, seed, device)
    words = _answers(dress, symbols, found.shape[-1], feed, head=head)
    own = head and words is not None
    readout = None if own else Readout(found.shape[-1], symbols, seed, found)
    said = torch.arange(symbols) if words is None else words
    if feed.seconds:
        levels, name, sentence, ahead = language.of_text, "text", "the next symbol of the text being read", True
    elif _reads_on(model, call, probe, found, device, feed.tokens_first):
        levels, name, sentence, ahead = language.of_text, "text", "the next symbol", True
    else:
        language = Language(symbols, *RIDDLES, seed=seed)
        levels, name, ahead = language.of_riddles, "riddles", False
        sentence = "what follows from each symbol and the one before it"

    def draw(one: int, size: int, *, train: bool) -> tuple[Any, Tensor]:
        generator = torch.Generator().manual_seed(one)
        if ahead:
            text = language.text(size, tokens + 1, generator)
            x, y = text[:, :-1], text[:, 1:]
        else:
            x, y = language.riddles(size, tokens, generator)
        return call(x), said[y]

    floor = 0.0 if feed.seconds else levels.both
    return Task(name, sentence, levels.chance, levels.own, floor, TargetLoss(readout, feed.tokens_first), draw, device)


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

    def draw(one: int, size: int, *, train: bool) -> tuple[Any, Tensor]:
        generator = torch.Generator().manual_seed(one)
        y = torch.randint(classes, (size,), generator=generator)
        x = torch.randint(language.symbols, (size, tokens), generator=generator)
        often = torch.rand((size, tokens), generator=generator) < 0.3
        return _call(feed, dress, torch.where(often, y[:, None], x)), y

    sentence = f"which of {classes} symbols a sequence holds most of"
    return Task("topic", sentence, math.log(classes), None, 0.0, TargetLoss(readout, feed.tokens_first), draw, device)


# ---------------------------------------------------------------- symbols as a model reads and says them


def _call(feed: Feed, dress: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    content = dress(x)
    return feed.call(content, content if feed.seconds else None)


def _words(model: nn.Module, seed: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Symbols as token ids, none of which the configuration gives a special meaning."""
    size = _vocabulary(model)
    config = getattr(model, "config", None)
    special = {
        first_option(config, f"{name}_token_id") for name in ("pad", "bos", "eos", "sep", "cls", "decoder_start")
    }
    free = [word for word in range(size) if word not in special]
    if len(free) < 2:
        raise TrialError(f"the model reads {size} words, too few for the built-in task; pass data.")
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor(free)[order[:SYMBOLS]]

    def dress(x: Tensor) -> Tensor:
        return ids[x]

    return dress, len(ids)


def _vectors(feed: Feed, tokens: int, seed: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Symbols as fixed Gaussian vectors, to which sines of the position are added, of half their energy."""
    width = feed.shape[2]
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn((SYMBOLS, width), generator=draw)
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(tokens)[:, None] * frequency
    places = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]

    def dress(x: Tensor) -> Tensor:
        return table[x] + places

    return dress, SYMBOLS


def _answers(dress: Callable[[Tensor], Tensor], symbols: int, width: int, feed: Feed, *, head: bool) -> Tensor | None:
    """Which output says which symbol; None where the head has none for it, so that a readout is put behind it."""
    if feed.kind == "tokens":
        ids = dress(torch.arange(symbols))
        if int(ids.max()) < width and head:
            return ids
    return torch.arange(symbols) if width >= symbols and head else None


def _vocabulary(model: nn.Module) -> int:
    ask = getattr(model, "get_input_embeddings", None)
    weight = getattr(ask(), "weight", None) if callable(ask) else None
    if isinstance(weight, Tensor):
        return int(weight.shape[0])
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not sizes:
        raise TrialError("no table of words was found in the model, so that its vocabulary is unknown; pass data.")
    return sizes[0]  # the words' own is made first; a position table comes after it


def _longest(model: nn.Module, shown: int) -> int:
    """Tokens that surely fit: as many as were shown, or as the configuration allows."""
    limit = first_option(getattr(model, "config", None), "max_position_embeddings", "n_positions")
    return max(shown, limit - 4) if isinstance(limit, int) else shown


def _seen(model: nn.Module, batch: Any) -> tuple[Tensor, bool]:
    """What the model returns, and whether it is logits of a head rather than states."""
    output = run(model, batch)
    found = outputs(output)
    if found is None:
        raise TrialError(f"{type(model).__name__} returns neither logits nor states, so that no task fits; pass data.")
    named = getattr(output, "logits", None) is found
    return found, named or _has_head(model, found)


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
    if isinstance(batch, tuple):
        return tuple(_moved(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch
