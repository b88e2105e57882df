"""Which patch of an image is beside which: the rows and columns of the grid, of the forward that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.capture.wrappers import bare
from fullrank.edit import Edit
from fullrank.edit.forwards import EditedForward, Enclosed
from fullrank.edit.handle import make
from fullrank.edit.places import module_at, one_stack
from fullrank.errors import EditError, RemedyError
from fullrank.remedies.patient import Patient

__all__ = ["PatchGrid", "grid_of", "is_image"]


@dataclass(eq=False)
class PatchGrid:
    """The grid of the forward that runs or ran last; patches are counted row by row.

    Attributes:
        rows: of patches.
        columns: of patches.
    """

    rows: int
    columns: int

    def of(self, patches: int) -> tuple[int, int]:
        """The grid, where so many patches are one.

        Args:
            patches: how many.

        Returns:
            Rows and columns.

        Raises:
            EditError: where they are no such grid.
        """
        if self.rows * self.columns != patches:
            raise EditError(f"{patches} patches are no grid of {self.rows} × {self.columns}; use windows=1.")
        return self.rows, self.columns


def is_image(one: Any) -> bool:
    """Whether an argument of a model is a batch of images."""
    return isinstance(one, Tensor) and one.ndim >= 4 and one.is_floating_point()


def grid_of(patient: Patient, stack: str, patches: int) -> tuple[PatchGrid, Callable[[], Edit]]:
    """Find the grid, and what keeps it right for images of another form.

    It is that of the last convolution before the first block that makes so many places, in every forward anew. Where
    there is none, patches are taken for squares, and images of another form than now are refused.

    Args:
        patient: the model.
        stack: name of its blocks.
        patches: how many.

    Returns:
        The grid and a function that makes the edit.

    Raises:
        RemedyError: where it cannot be told.
    """
    model = bare(patient.model)
    convolutions: list[tuple[nn.Module, PatchGrid]] = []
    begun: list[bool] = []
    images: set[tuple[int, int]] = set()

    def convolved(module: nn.Module, args: Any, output: Any) -> None:
        if not begun and output.ndim == 4 and output.shape[-2] * output.shape[-1] == patches:
            convolutions.append((module, PatchGrid(*output.shape[-2:])))

    first = module_at(patient.model, one_stack(patient.anatomy, stack).paths[0])
    hooks = [module.register_forward_hook(convolved) for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks.append(first.register_forward_pre_hook(lambda module, args: begun.append(True)))
    hooks.append(
        model.register_forward_pre_hook(
            lambda module, args, kwargs: images.update(_forms(args, kwargs)), with_kwargs=True
        )
    )
    try:
        with undisturbed(patient.model):
            patient.forward()
    finally:
        for hook in hooks:
            hook.remove()
    if convolutions:
        module, grid = convolutions[-1]
        what = "note the grid of patches"
        return grid, partial(make, what, [type(module).__name__], [lambda: Enclosed(module, _Noting(grid))])
    rows = _rows_of(patches, next(iter(images))) if len(images) == 1 else 0
    if rows == 0:
        raise RemedyError(
            f"which of the {patches} patches of this {type(model).__name__} are beside each other is not known: no "
            "convolution makes a grid of them, and they are no squares of one form of images; use windows=1."
        )
    grid = PatchGrid(rows, patches // rows)
    what = "see that images keep their form"
    return grid, partial(make, what, [type(model).__name__], [lambda: Enclosed(model, _SameForm(images))])


def _forms(args: Any, kwargs: Any) -> set[tuple[int, int]]:
    """Height and width of the images that a model is called with."""
    return {(int(one.shape[-2]), int(one.shape[-1])) for one in (*args, *kwargs.values()) if is_image(one)}


def _rows_of(patches: int, form: tuple[int, int]) -> int:
    """Of a grid of so many square patches of an image; 0 where they are none."""
    rows = round((patches * form[0] / form[1]) ** 0.5)
    return rows if rows and patches % rows == 0 and rows * form[1] == patches // rows * form[0] else 0


class _Noting:
    """Around the convolution that makes patches."""

    what = "note the grid of patches"

    def __init__(self, grid: PatchGrid) -> None:
        self._grid = grid

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        output = run(*args, **kwargs)
        self._grid.rows, self._grid.columns = output.shape[-2:]
        return output


class _SameForm:
    """Around the model: refuses images of another form."""

    what = "see that images keep their form"

    def __init__(self, forms: set[tuple[int, int]]) -> None:
        self._forms = forms

    def __call__(
        self, forward: EditedForward, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any:
        if _forms(args, kwargs) - self._forms:
            raise EditError(
                "reduce-tokens pools by windows of the grid of patches, which is known for images of "
                f"{sorted(self._forms)[0]} alone: repair the model with images of this form, or use windows=1."
            )
        return run(*args, **kwargs)
