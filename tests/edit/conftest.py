"""The plain models of the capture tests are edited here."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "capture"))


@pytest.fixture(autouse=True)
def reference_path():
    """Twins are compared with on the path that an edited `nn.TransformerEncoder` takes; one test is about the other."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)
