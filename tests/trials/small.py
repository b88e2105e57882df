"""Small networks that learn in a moment."""

import torch
from torch import nn


def encoder(*, layers=2, width=16, dropout=0.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, dropout=dropout)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Bigram(nn.Module):
    """Says the next word from the last one alone; logits are a plain tensor."""

    def __init__(self, words=20, width=8, *, dropout=0.0, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(words, width)
            self.norm = nn.BatchNorm1d(width)
            self.out = nn.Linear(width, words)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = self.norm(x.flatten(0, 1)).reshape(x.shape)
        return self.out(self.dropout(x))


def text(count, *, seed=0, words=20, size=4, tokens=8):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(words, (size, tokens), generator=draw) for _ in range(count)]
