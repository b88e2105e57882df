"""A transformer with every scale that theories speak of, in plain torch."""

import math

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Heads of width d/H; entries of W_Q and W_K have `qk` times the standard deviation 1/√d, others 1/√d."""

    def __init__(self, width, heads, *, causal, qk):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        for linear, scale in ((self.q, qk), (self.k, qk), (self.v, 1.0), (self.o, 1.0)):
            nn.init.normal_(linear.weight, std=scale / math.sqrt(width))

    def forward(self, x):
        """Of tokens (..., T, d)."""
        split = [f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        mixed = functional.scaled_dot_product_attention(*split, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """φ between two linear maps of fan-in standard deviation; `gain` makes φ preserve the mean square."""

    def __init__(self, width, *, activation, gain):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.activation = activation
        nn.init.normal_(self.up.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.down.weight, std=math.sqrt(gain / (4 * width)))

    def forward(self, x):
        """Token by token."""
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """Attention and an MLP, norms before, after or around, branches multiplied by `branch`."""

    def __init__(self, width, heads, *, placement, branch, causal, qk, activation, gain):
        super().__init__()
        self.placement, self.branch = placement, branch
        self.attention = Attention(width, heads, causal=causal, qk=qk)
        self.mlp = MLP(width, activation=activation, gain=gain)
        before, after = placement in ("pre", "peri"), placement in ("post", "peri")
        self.before = nn.ModuleList(nn.LayerNorm(width) if before else nn.Identity() for _ in range(2))
        self.after = nn.ModuleList(nn.LayerNorm(width) if after else nn.Identity() for _ in range(2))

    def forward(self, x):
        """Attention, then the MLP."""
        for index, branch in enumerate((self.attention, self.mlp)):
            written = branch(self.before[index](x))
            if self.placement == "post":
                x = self.after[index](x + self.branch * written)
            else:
                x = x + self.branch * self.after[index](written)
        return x


class Transformer(nn.Module):
    """Embeddings of tokens, with a direction that all of them share, so that their mean cosine is `correlation`."""

    def __init__(
        self,
        *,
        depth,
        width=128,
        heads=4,
        placement="pre",
        branch=1.0,
        qk=1.0,
        causal=False,
        vocabulary=997,
        correlation=0.1,
        activation=functional.relu,
        gain=2.0,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        shared = torch.randn(width)
        with torch.no_grad():
            self.embedding.weight.copy_(
                math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * self.embedding.weight
            )
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                placement=placement,
                branch=branch,
                causal=causal,
                qk=qk,
                activation=activation,
                gain=gain,
            )
            for _ in range(depth)
        )

    def forward(self, input_ids):
        """The stream after the last block."""
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x
