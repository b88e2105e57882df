"""Small models and what is asked of their references: the same draws, no trace."""

import random

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from untouched import everything

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def llama(**options):
    return seeded(lambda: LlamaModel(LlamaConfig(**SIZES | options)))


def moved(model):
    """The same model with every parameter somewhere else, as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def alike(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def whole_state(model):
    return everything(model) | {"python": random.getstate(), "numpy": np.random.get_state()[1].tolist()}


class Scale(nn.Module):
    """A module with a parameter of its own and no way to say how it starts."""

    def __init__(self, width=8):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale
