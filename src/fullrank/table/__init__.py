"""The table: one row per number, the same for everything measured and everything predicted.

The twelve columns are frozen. A number that could not be had is a row too: its `value` is NA and its `note` says
why. The note travels with the row (and through every file format) but is no column of the frame.
"""

from fullrank.table.collection import Table
from fullrank.table.files import SCHEMA_VERSION, check_schema, write_atomically
from fullrank.table.rows import COLUMNS, Row, headline
from fullrank.table.scopes import context_of, in_context, without_context
from fullrank.table.slopes import Slope

__all__ = [
    "COLUMNS",
    "SCHEMA_VERSION",
    "Row",
    "Slope",
    "Table",
    "check_schema",
    "context_of",
    "headline",
    "in_context",
    "without_context",
    "write_atomically",
]
