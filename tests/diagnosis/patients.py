"""Small random models in float64 and what tests of interventions know of them by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import transformers as hf
from family import ENDS, TEXT, ids
from plain import PlainGPT, tokens
from torch import Tensor, nn

from fullrank.capture import Anatomy, survey

SMALL = TEXT | {"num_hidden_layers": 3}
RIGHT = torch.tensor([[1] * 6 + [0] * 3, [1] * 9, [1] * 8 + [0]])
LEFT = RIGHT.flip(-1)


@dataclass
class Patient:
    """A model and what the tests know of it.

    Attributes:
        model: in evaluation mode, float64.
        batch: what it is called with.
        blocks: path of the module list.
        stack: name of the stack.
        real: (sequences, tokens) bool; None for all.
        causal: whether it never looks ahead.
        known: whether `real` is told to `apply`; else the masks of calls must show it.
    """

    model: nn.Module
    batch: dict[str, Any]
    blocks: str
    stack: str
    real: Tensor | None = None
    causal: bool = False
    known: bool = True

    def __call__(self) -> Tensor:
        output = self.model(**self.batch)
        return output if isinstance(output, Tensor) else output[0]

    @property
    def told(self) -> Tensor | None:
        return self.real if self.known else None

    def anatomy(self) -> Anatomy:
        return survey(self.model, self)

    def block(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.blocks)[layer - 1]

    def at_real(self, X: Tensor) -> Tensor:
        return X if self.real is None else X[self.real]


def gpt2() -> Patient:
    config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=64, **ENDS)
    return Patient(hf.GPT2Model(config), {"input_ids": ids(), "use_cache": False}, "h", "decoder", causal=True)


def bert() -> Patient:
    model = hf.BertModel(hf.BertConfig(**SMALL))
    batch = {"input_ids": ids(), "attention_mask": RIGHT}
    return Patient(model, batch, "encoder.layer", "encoder", RIGHT.bool())


def bert_untold() -> Patient:
    """Padding that nobody tells of: the mask of every call shows it."""
    return replace(bert(), known=False)


def llama_left() -> Patient:
    model = hf.LlamaModel(hf.LlamaConfig(**SMALL, num_key_value_heads=2))
    batch = {"input_ids": ids(), "attention_mask": LEFT, "use_cache": False}
    return Patient(model, batch, "layers", "decoder", LEFT.bool(), causal=True)


def llama_right(**options: Any) -> Patient:
    model = hf.LlamaModel(hf.LlamaConfig(**SMALL, num_key_value_heads=2, **options))
    batch = {"input_ids": ids(), "attention_mask": RIGHT, "use_cache": False}
    return Patient(model, batch, "layers", "decoder", RIGHT.bool(), causal=True)


def llama_eager() -> Patient:
    """The same model, which softmaxes itself."""
    return llama_right(attn_implementation="eager")


def t5_encoder() -> Patient:
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=50)
    batch = {"input_ids": ids(), "attention_mask": RIGHT}
    return Patient(hf.T5EncoderModel(config), batch, "encoder.block", "encoder", RIGHT.bool())


def vit() -> Patient:
    sizes = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    model = hf.ViTModel(hf.ViTConfig(**sizes, image_size=16, patch_size=4))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    return Patient(model, {"pixel_values": images}, "layers", "vision")


def torch_encoder() -> Patient:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3)
    states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1)).double()
    batch = {"src": states, "src_key_padding_mask": ~RIGHT.bool()}
    return Patient(model, batch, "layers", "encoder", RIGHT.bool())


def plain() -> Patient:
    return Patient(PlainGPT(), {"ids": tokens()}, "h", "decoder", causal=True)


def plain_softmax() -> Patient:
    """The same model, which softmaxes itself."""
    return Patient(PlainGPT(fused=False), {"ids": tokens()}, "h", "decoder", causal=True)


PATIENTS: dict[str, Callable[[], Patient]] = {
    one.__name__: one
    for one in (
        *(gpt2, bert, bert_untold, llama_left, llama_right, llama_eager),
        *(t5_encoder, vit, torch_encoder, plain, plain_softmax),
    )
}


def admit(name: str | Callable[[], Patient]) -> Patient:
    """A patient in evaluation mode, its matrices drawn so large that attention is not uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patient = (PATIENTS[name] if isinstance(name, str) else name)()
        with torch.no_grad():
            for parameter in patient.model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.25)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    patient.model.double().eval()
    return patient


@functools.cache
def anatomy(name: str) -> Anatomy:
    """Surveyed once."""
    return admit(name).anatomy()


@dataclass
class Ward:
    """Sequences as `Trials` takes them.

    Attributes:
        batch: tensors with sequences first.
        real: (sequences, tokens) bool, or None.
        documents: not None where rows hold several.
        divisible: whether they may be run one by one.
        forwards: how many forwards there were, shared by all parts.
    """

    batch: dict[str, Any]
    real: Tensor | None = None
    documents: object | None = None
    divisible: bool = True
    forwards: list[int] | None = None

    @property
    def sequences(self) -> int:
        return next(len(value) for value in self.batch.values() if isinstance(value, Tensor))

    def part(self, start: int, stop: int) -> Self:
        cut = {k: v[start:stop] if isinstance(v, Tensor) else v for k, v in self.batch.items()}
        return replace(self, batch=cut, real=None if self.real is None else self.real[start:stop])

    def run(self, model: nn.Module) -> Any:
        if self.forwards is not None:
            self.forwards.append(self.sequences)
        return model(**self.batch)
