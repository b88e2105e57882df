"""Sound to listen to: seeded synthetic features of the shape that a speech model takes."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.errors import BatchError
from fullrank.spec.subject import Subject, first_option

__all__ = ["synthetic"]

_SECOND = 16_000  # samples; what raw-waveform speech models are trained at


def synthetic(subject: Subject, *, count: int, seed: int) -> Tensor:
    """Noise whose loudness wanders, mean 0 and variance 1 per recording, in the shape of the model's main input.

    Whisper: (count, mel bands, 2 × source positions). Spectrogram transformers: (count, frames, mel bands). Raw
    waveforms: (count, 16000), one second.

    Args:
        subject: the model.
        count: how many recordings.
        seed: of the draw.

    Returns:
        The features, float32.

    Raises:
        BatchError: where the configuration does not say the shape.
    """
    config, main = subject.config, getattr(subject.model, "main_input_name", "")
    bands = first_option(config, "num_mel_bins", "input_feat_per_channel")
    frames = first_option(config, "max_source_positions", "max_length")
    if (
        main == "input_features"
        and isinstance(bands, int)
        and isinstance(frames, int)
        and hasattr(config, "num_mel_bins")
    ):
        size: tuple[int, ...] = (count, bands, 2 * frames)
        time = 2
    elif main == "input_values" and isinstance(bands, int) and isinstance(frames, int):
        size, time = (count, frames, bands), 1
    elif main == "input_values":
        size, time = (count, _SECOND), 1
    else:
        raise BatchError(f"the shape of the input of {subject.name} is not known here; pass a batch from Python.")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, generator=generator)
    steps = size[time]
    knots = torch.randn(count, 1, max(2, steps // 50), generator=generator)
    loudness = torch.nn.functional.interpolate(knots, size=steps, mode="linear", align_corners=True).exp()
    sound = noise * (loudness if time == 2 else loudness.mT if len(size) == 3 else loudness[:, 0])
    rest = tuple(range(1, len(size)))
    return (sound - sound.mean(rest, keepdim=True)) / sound.std(rest, keepdim=True)
