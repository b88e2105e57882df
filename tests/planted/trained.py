"""Small transformers trained on real data within seconds: bytes of the texts that ship, and handwritten digits."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, TOKENS = 64, 4, 64
BEGIN = 256  # one id beyond the bytes begins a text
VOCABULARY = 258
HELD_OUT = 0.3  # of every text, its end; of the digits, the last
HALVES = ("development", "blind", "second blind")
"""Limits were set on the first, frozen and run on the second; rules were changed, frozen again, run on the third."""

Batch = dict[str, Tensor]


# ------------------------------------------------------------ data


@functools.cache
def texts() -> list[Tensor]:
    """Bytes of every text that ships with the package."""
    folder = files("fullrank.spec") / "texts"
    names = sorted(one.name for one in folder.iterdir() if one.name.endswith(".txt"))
    return [torch.tensor(list((folder / name).read_bytes())) for name in names]


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [-1, 1] and what they show."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(found.target)


def training_windows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes of `count` places (count, TOKENS) in the beginnings of the texts, and from which text each is."""
    which = torch.randint(len(texts()), (count,), generator=generator)
    windows = []
    for index in which.tolist():
        text = texts()[index]
        last = int(len(text) * (1 - HELD_OUT)) - TOKENS
        start = int(torch.randint(last, (1,), generator=generator))
        windows.append(text[start : start + TOKENS])
    return torch.stack(windows), which


def held_out_windows(half: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bytes of the ends of the texts, which no model was trained on: every other text for each half.

    The last part has all of them, cut at other places.
    """
    part = HALVES.index(half)
    mine = [index for index in range(len(texts())) if part == 2 or index % 2 == part]
    found = []
    for index in mine:
        text = texts()[index]
        first = int(len(text) * (1 - HELD_OUT)) + (TOKENS // 2 if part == 2 else 0)
        found += [(text[start : start + TOKENS], index) for start in range(first, len(text) - TOKENS, TOKENS)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return torch.stack([found[i][0] for i in order]), torch.tensor([found[i][1] for i in order])


def training_digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    which = torch.randint(int(len(images) * (1 - HELD_OUT)), (count,), generator=generator)
    return images[which], labels[which]


def held_out_digits(half: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    images, labels = digits()
    mine = torch.arange(int(len(images) * (1 - HELD_OUT)), len(images))[HALVES.index(half) :: 3]
    which = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed))[:count]]
    return images[which], labels[which]


# ------------------------------------------------------------ models of plain torch


class Layer(nn.TransformerEncoderLayer):
    """A layer of torch whose tokens are drawn together by `contrast`, which is 1 in every model that is trained."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.contrast = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, src: Tensor, *args: Any, **options: Any) -> Tensor:
        X = super().forward(src, *args, **options)
        mean = X.mean(1, keepdim=True)
        return mean + self.contrast * (X - mean)


class Classifier(nn.Module):
    """`nn.TransformerEncoder` over 16 patches of a digit, the mean token classified; returns its loss."""

    def __init__(self, layers: int, norm_first: bool, width: int, heads: int) -> None:
        super().__init__()
        self.layers, self.norm_first, self.width, self.heads = layers, norm_first, width, heads
        self.read = nn.Linear(4, width)
        self.places = nn.Parameter(torch.randn(16, width) * 0.5)
        layer = Layer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=norm_first)
        last = nn.LayerNorm(width) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, layers, norm=last, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        X = self.encoder(self.read(x) + self.places)
        logits = self.head(X.mean(1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


# ------------------------------------------------------------ architectures


@dataclass(frozen=True)
class Architecture:
    """How a small model is made, and on what it is trained.

    Attributes:
        name: of its kind.
        layers: how many blocks.
        make: a model; `width` and `heads` may be others than those that are trained.
        batch: from data.
        reads: `text` or `digits`.
        causal: whether tokens see only earlier ones.
        pre_norm: whether branches read the stream after a norm, and add to it without one.
        rate: the highest learning rate.
        steps: of Adam.
    """

    name: str
    layers: int
    make: Callable[..., nn.Module]
    batch: Callable[[tuple[Tensor, Tensor], torch.Generator], Batch]
    reads: str
    causal: bool
    pre_norm: bool
    rate: float = 3e-3
    steps: int = 300

    @property
    def documents(self) -> int:
        """Of a batch that is examined."""
        return 8 if self.reads == "text" else 16

    def training(self, generator: torch.Generator) -> Batch:
        draw = training_windows if self.reads == "text" else training_digits
        return self.batch(draw(12 if self.reads == "text" else 32, generator), generator)

    def held_out(self, half: str, seed: int) -> Batch:
        """A batch that no model has seen, of the half's own documents."""
        draw = held_out_windows if self.reads == "text" else held_out_digits
        return self.batch(draw(half, self.documents, seed), torch.Generator().manual_seed(seed))


def _begun(data: tuple[Tensor, Tensor], generator: torch.Generator) -> Batch:
    ids = data[0].clone()
    ids = torch.cat([torch.full_like(ids[:, :1], BEGIN), ids[:, :-1]], 1)
    return {"input_ids": ids, "labels": ids}


def _greys(data: tuple[Tensor, Tensor], generator: torch.Generator) -> Batch:
    """Images as 16 tokens of 17 grey levels."""
    levels = (functional.avg_pool2d(data[0], 2).flatten(1) + 1) * 8
    return {"input_ids": levels.round().long(), "labels": data[1]}


def _images(data: tuple[Tensor, Tensor], generator: torch.Generator) -> Batch:
    return {"pixel_values": data[0], "labels": data[1]}


def _patches(data: tuple[Tensor, Tensor], generator: torch.Generator) -> Batch:
    patches = functional.unfold(data[0], 2, stride=2).transpose(1, 2)
    return {"x": patches, "labels": data[1]}


def _gpt2(layers: int, width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": BEGIN, "eos_token_id": BEGIN}
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": TOKENS, "vocab_size": VOCABULARY}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **still, loss_type="ForCausalLM"))


def _sizes(layers: int, width: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
    }


def _llama(layers: int, width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    ends = {"bos_token_id": BEGIN, "eos_token_id": BEGIN, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes(layers, width, heads), **ends, num_key_value_heads=heads // 2))


def _bert(layers: int, width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": TOKENS}
    sizes = _sizes(layers, width, heads) | {"vocab_size": 17, "num_labels": 10}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, **still))


def _vit(layers: int, width: int = WIDTH, heads: int = HEADS) -> nn.Module:
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return hf.ViTForImageClassification(hf.ViTConfig(**_sizes(layers, width, heads), **images))


def _encoder(layers: int, width: int = WIDTH, heads: int = HEADS, *, norm_first: bool) -> nn.Module:
    return Classifier(layers, norm_first, width, heads)


ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (
        Architecture("gpt2", 6, _gpt2, _begun, "text", causal=True, pre_norm=True),
        Architecture("llama", 6, _llama, _begun, "text", causal=True, pre_norm=True),
        Architecture("bert", 4, _bert, _greys, "digits", causal=False, pre_norm=False, rate=1e-3, steps=400),
        Architecture("vit", 5, _vit, _images, "digits", causal=False, pre_norm=True, steps=400),
        Architecture(
            *("pre-norm encoder", 5, functools.partial(_encoder, norm_first=True), _patches, "digits"),
            causal=False,
            pre_norm=True,
            rate=1e-3,
        ),
        Architecture(
            *("post-norm encoder", 4, functools.partial(_encoder, norm_first=False), _patches, "digits"),
            causal=False,
            pre_norm=False,
            rate=1e-3,
        ),
    )
}


# ------------------------------------------------------------ training


def fresh(name: str, seed: int, **sizes: int) -> nn.Module:
    """A model at its own initialisation, in evaluation mode."""
    made = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made.make(**({"layers": made.layers} | sizes)).eval()


def trained(name: str, seed: int, *, still: tuple[int, ...] = (), cache: Path | None = None) -> nn.Module:
    """A model trained on the beginnings of the texts, or on the first digits.

    Args:
        name: of the architecture.
        seed: of weights and data.
        still: layers whose queries and keys are left where they started.
        cache: a folder where weights are kept.

    Returns:
        It, in evaluation mode.
    """
    from planted.faults import limbs

    model, made = fresh(name, seed), ARCHITECTURES[name]
    where = cache / f"{name.replace(' ', '_')}_{seed}_{'_'.join(map(str, still))}.pt" if cache else None
    if where is not None and where.exists():
        model.load_state_dict(torch.load(where))
        return model
    kept = [(limb, limb.clone()) for layer in still for role in "qk" for limb in limbs(model, layer)[role].tensors]
    generator = torch.Generator().manual_seed(seed)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=made.rate, weight_decay=0.01, fused=True)
    model.train()
    for step in range(made.steps):
        warm = min(1.0, (step + 1) / 30)
        for group in optimiser.param_groups:
            group["lr"] = made.rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / made.steps)))
        loss = model(**made.training(generator))["loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        for limb, start in kept:
            limb.copy_(start)
    model.eval().zero_grad(set_to_none=True)
    if where is not None:
        where.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), where)
    return model


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small models are faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
