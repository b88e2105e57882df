"""The report: a table with what it is of, its figures, its page, its terminal rendering."""

from fullrank.report.overlay import Overlay
from fullrank.report.report import Report
from fullrank.report.spectrum import HeadSpectrum
from fullrank.report.variants import Variants

__all__ = ["HeadSpectrum", "Overlay", "Report", "Variants"]
