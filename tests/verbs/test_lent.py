"""A twin made of the same modules is not surveyed again, and gives what it gives where it is."""

import copy

import torch
from torch import nn

import fullrank.capture
from fullrank.verbs.batches import as_calls
from fullrank.verbs.lent import is_lent
from fullrank.verbs.passes import anatomy_of
from fullrank.verbs.ranks import Ranks
from fullrank.verbs.referenced import reference_rows

X = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attend(y, y, y, need_weights=False)[0]


class Turning(nn.Module):
    """Runs its blocks in the order that a number asks for."""

    def __init__(self, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.sign = nn.Parameter(torch.ones(()))

    def forward(self, x):
        for block in self.blocks if self.sign > 0 else reversed(self.blocks):
            x = block(x)
        return x


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x):
        for _ in range(3):
            x = self.blocks[0](x)
        return x


def surveyed(model):
    calls = as_calls(model, X)
    with fullrank.capture.undisturbed(model):
        return anatomy_of(model, calls, Ranks()), calls


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def forwards(twin, model, like):
    anatomy, calls = surveyed(model)
    count = []
    handle = twin.register_forward_pre_hook(lambda *_: count.append(1))
    rows, notes = reference_rows(twin, calls, anatomy, like=like)
    handle.remove()
    return len(count), [(row.key, row.value, row.stderr) for row in rows], notes


def test_the_survey_of_the_model_saves_that_of_its_twin_and_changes_no_number():
    model = seeded(Turning)
    twin = copy.deepcopy(model)
    once, rows, notes = forwards(twin, model, model)
    twice, others, said = forwards(twin, model, None)
    assert (once, twice) == (1, 2)
    assert rows == others
    assert rows
    assert notes == said


def test_blocks_that_a_twin_calls_in_another_order_are_no_reference():
    model = seeded(Turning)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.sign.fill_(-1)
    _, rows, notes = forwards(twin, model, model)
    assert rows == []
    assert notes == ["no reference at initialisation: its encoder passes blocks.2 as layer 1, and not blocks.0."]


def test_nothing_is_lent_to_what_is_made_otherwise():
    model = seeded(Turning)
    anatomy, _ = surveyed(model)
    assert is_lent(anatomy, model, copy.deepcopy(model))
    assert not is_lent(anatomy, None, copy.deepcopy(model))
    assert not is_lent(anatomy, model, Turning(4))
    other = copy.deepcopy(model)
    other.blocks[1].norm = nn.RMSNorm(16)
    assert not is_lent(anatomy, model, other)
    replaced = copy.deepcopy(model)
    replaced.blocks[1].forward = lambda x: x
    assert not is_lent(anatomy, replaced, copy.deepcopy(model))


def test_nothing_is_lent_where_a_block_is_several_layers():
    """How often it is called may hang on numbers."""
    model = seeded(Shared)
    anatomy, _ = surveyed(model)
    assert [len(stack.paths) for stack in anatomy.stacks] == [3]
    assert not is_lent(anatomy, model, copy.deepcopy(model))
