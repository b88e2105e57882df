"""The term is added to the loss in whatever a model returns it, once; what cannot take it leaves it to `penalty()`."""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import kinds
import pytest
import torch
from torch import Tensor, nn

import fullrank
from fullrank.zoo import StateSpace, StateSpaceConfig, Transformer, TransformerConfig

SIZES = {"depth": 2, "width": 16, "vocabulary": 50}
IDS = kinds.ids()


class Named(NamedTuple):
    logits: Tensor
    loss: Tensor


@dataclasses.dataclass
class Data:
    logits: Tensor
    loss: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    loss: Tensor


class Slots:
    __slots__ = ("logits", "loss")

    def __init__(self, logits: Tensor, loss: Tensor) -> None:
        self.logits, self.loss = logits, loss


class Fixed:
    def __init__(self, logits: Tensor, loss: Tensor) -> None:
        self._values = logits, loss

    logits = property(lambda self: self._values[0])
    loss = property(lambda self: self._values[1])


KINDS = {
    "dict": dict,
    "user dict": collections.UserDict,
    "named tuple": Named,
    "dataclass": Data,
    "frozen dataclass": Frozen,
    "namespace": types.SimpleNamespace,
    "slots": Slots,
}
CLOSED = {
    "property": Fixed,
    "read-only mapping": lambda logits, loss: types.MappingProxyType({"logits": logits, "loss": loss}),
}


class Model(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Any:
        y = self.encoder(self.embedding(ids))
        return self.kind(logits=y, loss=y.pow(3).mean())


def built(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(kind).double()


def loss_of(output):
    return output["loss"] if hasattr(output, "keys") else output.loss


REMEDIES = {"entropy-regulariser": {"theta": 0.0, "margin": 0.0, "weight": 2.0}, "rank-regulariser": {"weight": 3.0}}


@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.parametrize("kind", [*KINDS, *CLOSED])
def test_whatever_the_model_returns(kind, remedy):
    model = built((KINDS | CLOSED)[kind]).train()
    plain = loss_of(model(IDS)).detach()
    with fullrank.repair(model, remedy, batch={"ids": IDS}, **REMEDIES[remedy]) as repair:
        model.train()
        output = model(IDS)
        found, beside = loss_of(output), repair.penalty()
        term = model.get_submodule("fullrank_" + remedy.replace("-", "_")).value().detach()
        assert type(output) is type((KINDS | CLOSED)[kind](logits=IDS, loss=IDS))
        assert float(term) > 0.01
        torch.testing.assert_close((found + beside).detach(), plain + term, rtol=1e-6, atol=0)
        assert bool(beside == 0) == (kind in KINDS)
        (found + beside).backward()
        assert float(model.embedding.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("remedies", [["entropy-regulariser?theta=1&margin=0"], ["rank-regulariser"], list(REMEDIES)])
def test_models_of_the_zoo_train_with_labels(remedies):
    model = Transformer(TransformerConfig(kind="decoder", heads=2, **SIZES), seed=0).train()
    plain = model(input_ids=IDS, labels=IDS).loss.detach()
    with fullrank.repair(model, remedies, batch={"input_ids": IDS}) as repair:
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        terms = sum(one.value().detach() for n, one in model.named_children() if n.startswith("fullrank_"))
        torch.testing.assert_close(loss.detach(), plain + terms, rtol=1e-6, atol=0)
        assert float(terms) > 0
        assert float(repair.penalty()) == 0
        loss.backward()


def test_state_spaces_of_the_zoo_train_with_labels():
    model = StateSpace(StateSpaceConfig(**SIZES), seed=0).train()
    plain = model(input_ids=IDS, labels=IDS).loss.detach()
    with fullrank.repair(model, "rank-regulariser", batch={"input_ids": IDS}):
        model.train()
        found = model(input_ids=IDS, labels=IDS).loss.detach()
        torch.testing.assert_close(found, plain + model.fullrank_rank_regulariser.value().detach())
