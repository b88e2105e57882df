"""fullrank: does a transformer's signal survive its depth, its context length and its heads?

The names below load when they are first used, so that `import fullrank` costs little beyond `import torch`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fullrank.architecture import Architecture
    from fullrank.errors import ArchitectureError, FullrankError
    from fullrank.report import Report, Screening, Variants
    from fullrank.table import Row, Table
    from fullrank.verbs.examine import examine
    from fullrank.verbs.examine_each import examine_each
    from fullrank.verbs.load_repaired import load_repaired
    from fullrank.verbs.predict import predict
    from fullrank.verbs.repair import repair
    from fullrank.verbs.screen import screen
    from fullrank.verbs.trainability import trainability

__all__ = [
    "Architecture",
    "ArchitectureError",
    "FullrankError",
    "Report",
    "Row",
    "Screening",
    "Table",
    "Variants",
    "__version__",
    "examine",
    "examine_each",
    "load_repaired",
    "predict",
    "repair",
    "screen",
    "trainability",
]

_HOMES = {
    "Architecture": "fullrank.architecture",
    "ArchitectureError": "fullrank.errors",
    "FullrankError": "fullrank.errors",
    "Report": "fullrank.report",
    "Row": "fullrank.table",
    "Screening": "fullrank.report",
    "Table": "fullrank.table",
    "Variants": "fullrank.report",
    "examine": "fullrank.verbs.examine",
    "examine_each": "fullrank.verbs.examine_each",
    "load_repaired": "fullrank.verbs.load_repaired",
    "predict": "fullrank.verbs.predict",
    "repair": "fullrank.verbs.repair",
    "screen": "fullrank.verbs.screen",
    "trainability": "fullrank.verbs.trainability",
}

try:
    __version__ = version("fullrank")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fullrank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
