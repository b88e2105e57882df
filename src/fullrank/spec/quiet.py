"""Loading without chatter and without touching anybody's random numbers."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from fullrank.errors import SpecError

__all__ = ["forked_rng", "quiet", "transformers_or_refuse"]


def transformers_or_refuse() -> ModuleType:
    """The transformers package, imported when first needed.

    Returns:
        The module.

    Raises:
        SpecError: where it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError:
        raise SpecError("this SPEC needs Hugging Face transformers; pip install 'fullrank[hf]'.") from None
    return transformers  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars, log lines and warnings of transformers and the hub, then set all back as it was.

    What they would have said and a reader needs (weights missing from a checkpoint) is told in `Subject.notes`.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    chatter = transformers_or_refuse().utils.logging
    logs = [logging.getLogger(name) for name in ("huggingface_hub", "accelerate")]
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    levels, hub_bars = [log.level for log in logs], not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            chatter.set_verbosity_error()
            chatter.disable_progress_bar()
            disable_progress_bars()
            for log in logs:
                log.setLevel(logging.CRITICAL)
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
            if bars:
                chatter.enable_progress_bar()
            if hub_bars:
                enable_progress_bars()
            chatter.set_verbosity(verbosity)


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seed every global generator inside, give each its old state back afterwards.

    Initialisers draw from the global generators and take no other; models are built on the CPU, so CUDA generators
    are saved but not seeded.
    """
    import numpy as np

    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
