"""The function that a SPEC of Python code names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fullrank.errors import SpecError
from fullrank.spec.configuration import first_sentence
from fullrank.spec.grammar import Spec, close_matches

__all__ = ["factory_of"]


def factory_of(spec: Spec) -> Callable[[], Any]:
    """The callable that `package.module:factory` names; modules in the current directory can be imported.

    Args:
        spec: of kind `python`.

    Returns:
        The callable.

    Raises:
        SpecError: where module or attribute is missing, or it cannot be called.
    """
    module_name, _, path = spec.target.partition(":")
    with _current_directory_importable():
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # importing runs the user's own code
            message = first_sentence(error)
            raise SpecError(
                f"{spec.text}: importing {module_name} failed with {type(error).__name__}: {message}."
            ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise SpecError(f"{spec.text}: {module_name} has no {path!r}{close_matches(name, dir(found))}.")
        found = getattr(found, name)
    if isinstance(found, nn.Module) or not callable(found):
        raise SpecError(f"{spec.text} is {type(found).__name__}; it names a function that returns a model.")
    return found  # type: ignore[no-any-return]


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
