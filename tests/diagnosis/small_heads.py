"""A small model whose heads can be set by hand: tokens and one-hot positions, attention on the plain kernel."""

import functools

import torch
from torch import nn
from torch.nn import functional

import fullrank
from fullrank.diagnosis import Evidence

TOKENS, WIDTH, HEADS, VOCABULARY = 16, 64, 4, 40
DIM = WIDTH // HEADS
assert DIM == TOKENS  # a head can hold every position


class Block(nn.Module):
    def __init__(self, *, causal):
        super().__init__()
        self.causal = causal
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.norm_1(x)
        q, k, v = (part(y).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Small(nn.Module):
    """Positions are one-hot in the first TOKENS channels, tokens live in the others."""

    def __init__(self, *, blocks=3, causal=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block(causal=causal) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, labels=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def small(*, seed=0, blocks=3, causal=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Small(blocks=blocks, causal=causal).eval()
    with torch.no_grad():
        model.tokens.weight[:, :TOKENS] = 0
        model.positions.weight.zero_()
        model.positions.weight[:, :TOKENS] = 2 * torch.eye(TOKENS)
    return model


def of(weight, head):
    """The rows of a head in W_Q, W_K, W_V."""
    return weight[head * DIM : (head + 1) * DIM]


@torch.no_grad()
def clear_head(block, head):
    for linear in (block.q, block.k):
        of(linear.weight, head).zero_()
        of(linear.bias, head).zero_()


@torch.no_grad()
def point_to_the_previous(block, head, *, strength=4.0):
    """Logits of a query are large at the key before it, and equal elsewhere."""
    clear_head(block, head)
    of(block.q.weight, head)[:, :TOKENS] = strength * torch.eye(TOKENS).roll(-1, 0)  # position t to unit t − 1
    of(block.k.weight, head)[:, :TOKENS] = strength * torch.eye(TOKENS)


@torch.no_grad()
def rest_on(block, head, position, *, strength=4.0):
    """All queries attend to one position."""
    clear_head(block, head)
    of(block.q.bias, head)[0] = strength
    of(block.k.weight, head)[0, position] = strength


@torch.no_grad()
def copy_head(block, source, target):
    for linear in (block.q, block.k, block.v):
        of(linear.weight, target).copy_(of(linear.weight, source))
        of(linear.bias, target).copy_(of(linear.bias, source))
    columns = block.o.weight
    columns[:, target * DIM : (target + 1) * DIM] = columns[:, source * DIM : (source + 1) * DIM]


def batch(*, labels=False):
    ids = torch.randint(VOCABULARY, (8, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"ids": ids, "labels": ids.roll(-1, 1)} if labels else {"ids": ids}


def examined(model, *, gradients, weights):
    return fullrank.examine(
        model,
        batch(labels=gradients),
        spectrum=False,
        gradients=gradients,
        weights=weights,
        reference=False,
        blocks="blocks",
    )


@functools.cache
def initial_rows(causal, gradients, weights):
    """Of the same architecture under another seed."""
    rows = examined(small(seed=1, causal=causal), gradients=gradients, weights=weights).rows
    return tuple(rows.with_source("initialisation"))


def evidence_of(model, *, referenced=True, weights="trained", gradients=False, of_weights=False, **known):
    """What examine says of a model, beside what it says of another as its initialisation."""
    report = examined(model, gradients=gradients, weights=of_weights)
    beside = initial_rows(model.blocks[0].causal, gradients, of_weights) if referenced else ()
    return Evidence((*report.rows, *beside), report.about, weights=weights, **known)
