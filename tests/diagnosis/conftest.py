"""What all tests of interventions run under."""

import pytest
import torch


@pytest.fixture
def reference_path():
    """Twins are compared with on the path that an edited `nn.TransformerEncoder` takes."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)
