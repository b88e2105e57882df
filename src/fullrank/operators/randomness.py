"""Random numbers that belong to a measurement alone."""

import torch

__all__ = ["own_generator"]

_STREAM = 0x66756C6C72616E6B
"""Keeps the seeds of measurements apart from those of models. Both like 0, and equal seeds give related numbers: a
permutation drawn like the weights it permutes would not be independent of them."""


def own_generator(seed: int) -> torch.Generator:
    """A CPU generator whose numbers no generator with a small seed draws, apart from all global state."""
    return torch.Generator().manual_seed(_STREAM + seed)
