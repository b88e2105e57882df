"""Shapes and types of every metric are checked while the tests run; nothing reaches for a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["fullrank.metrics", "fullrank.operators"], "beartype.beartype")


@pytest.fixture
def generator():
    """A generator of one's own, so that no test depends on another's draws."""
    return torch.Generator().manual_seed(0)
