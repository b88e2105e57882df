"""What the user did that cannot work: one clear sentence each, and no trace left behind."""

__all__ = [
    "ArchitectureError",
    "BatchError",
    "CaptureError",
    "ContextError",
    "EditError",
    "FullrankError",
    "ModelError",
    "NonFiniteError",
    "OutputError",
    "RemedyError",
    "ShapeError",
    "SpecError",
    "TableError",
    "TheoryError",
    "TrialError",
]


class FullrankError(Exception):
    """Bad input, answered in one sentence that names the argument, what was found and what is accepted.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class ArchitectureError(FullrankError):
    """An architecture that no transformer can have, or one that cannot be told from a model."""


class SpecError(FullrankError):
    """A model SPEC that cannot be parsed, found or loaded."""


class ModelError(FullrankError):
    """A model in which what was asked for cannot be seen, for example one without repeated blocks."""


class NonFiniteError(ModelError):
    """Weights or activations that are not finite; names the first module where they appear."""


class BatchError(FullrankError):
    """A batch, text or image that does not fit the model, or in which nothing is left to measure."""


class ContextError(BatchError):
    """A context length that the model cannot take."""


class ShapeError(FullrankError):
    """Tensors whose shapes do not fit together, or an option outside its range."""


class CaptureError(ModelError):
    """An attention kernel or a module whose signals cannot be read."""


class TableError(FullrankError):
    """A table, report file or metric name that does not say what was expected."""


class OutputError(FullrankError):
    """A path that cannot be written."""


class EditError(FullrankError):
    """A change to a model's forward that cannot be made or undone; then nothing was changed."""


class RemedyError(FullrankError):
    """A remedy that is not known, cannot be applied to a model or cannot be undone now; then nothing was changed."""


class DiagnosisError(FullrankError):
    """A verdict that is not known."""


class TheoryError(FullrankError):
    """A theory that is not known, or parameters outside the range that it speaks of."""


class TrialError(FullrankError):
    """A model that cannot be trained for a trial, batches without a loss, or a setting outside its range."""
