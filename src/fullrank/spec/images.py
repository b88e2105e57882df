"""Images to look at: files, or seeded synthetic ones where none are given."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullrank.errors import BatchError
from fullrank.spec.configuration import first_sentence, refusals
from fullrank.spec.quiet import quiet
from fullrank.spec.subject import Subject, first_option

__all__ = ["ImageFiles", "expand", "read", "shape", "synthetic"]

ImageFiles = str | Path | Sequence[str | Path]
_SIDE = 224  # convolutional front ends take any size and do not say one
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def shape(subject: Subject) -> tuple[int, int, int]:
    """Channels, height and width of the images a model takes: as its configuration says, else 3 × 224 × 224."""
    channels = first_option(subject.config, "num_channels", "in_channels", "in_chans")
    size = first_option(subject.config, "image_size", "img_size", "input_size")
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        size = (_SIDE, _SIDE)
    return (channels if isinstance(channels, int) else 3), size[0], size[1]


def synthetic(subject: Subject, *, count: int, seed: int) -> Tensor:
    """Smooth random fields: Gaussian noise with spectrum 1/f^α, α from 1 (rough) to 3 (smooth), as natural images have.

    Every image has mean 0 and variance 1, the range in which processors hand images on, and channels that share half
    of their variance.

    Args:
        subject: the model; its configuration says channels, height and width.
        count: how many images.
        seed: of the draw.

    Returns:
        (count, channels, height, width), float32.
    """
    channels, height, width = shape(subject)
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, channels, height, width, generator=generator)
    shared = torch.randn(count, 1, height, width, generator=generator)
    noise = (own + shared) / 2**0.5
    f = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    f[0, 0] = 1.0
    alpha = torch.linspace(1.0, 3.0, count)[:, None, None, None]
    gain = f**-alpha
    gain[..., 0, 0] = 0.0  # no mean
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * gain, s=(height, width))
    spread: Tensor = field.std(dim=(1, 2, 3), keepdim=True)
    result: Tensor = field / spread.clamp_min(1e-12)
    return result


def expand(images: ImageFiles) -> list[Path]:
    """The image files of a path, a directory, a pattern such as `*.png`, or a list of these, in sorted order each.

    Args:
        images: what was given.

    Returns:
        At least one path.

    Raises:
        BatchError: where nothing is found.
    """
    given = [images] if isinstance(images, (str, Path)) else list(images)
    if not given:
        raise BatchError("images=[] names no file.")
    found: list[Path] = []
    for item in given:
        path = Path(item).expanduser()
        if path.is_dir():
            here = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not here:
                raise BatchError(f"images={str(item)!r} is a directory without image files.")
        elif path.exists() or not glob.has_magic(str(item)):
            here = [path]
        else:
            here = sorted(map(Path, glob.glob(str(path))))  # noqa: PTH207 - the pattern may be absolute
            if not here:
                raise BatchError(f"images={str(item)!r} matches no file.")
        found += here
    return found


def read(files: Sequence[Path], subject: Subject) -> Tensor:
    """The files' images as the model takes them: through its processor, else resized and scaled to [−1, 1].

    Args:
        files: image files.
        subject: the model.

    Returns:
        (images, channels, height, width), float32.

    Raises:
        BatchError: for a file that is no image, or that the processor refuses.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise BatchError("reading images needs Pillow; pip install 'fullrank[hf]'.") from None
    pictures: list[Any] = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        except UnidentifiedImageError:
            raise BatchError(f"images={str(file)!r} is no image that Pillow can read.") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or first_sentence(error)
            raise BatchError(f"images={str(file)!r} cannot be read: {reason}.") from None
    if subject.image_processor is not None:
        try:
            with quiet():
                return torch.as_tensor(subject.image_processor(images=pictures, return_tensors="pt")["pixel_values"])
        except refusals() as error:
            raise BatchError(
                f"the image processor of {subject.name} refuses these images: {first_sentence(error)}."
            ) from error
    return torch.stack([_plain(picture, shape(subject)) for picture in pictures])


def _plain(picture: Any, size: tuple[int, int, int]) -> Tensor:
    import numpy as np

    channels, height, width = size
    resized = picture.resize((width, height)).convert("L" if channels == 1 else "RGB")
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32).reshape(height, width, -1).copy())
    if pixels.shape[-1] != channels:
        raise BatchError(f"this model takes images of {channels} channels; pass a batch from Python.")
    return pixels.permute(2, 0, 1) / 127.5 - 1.0
