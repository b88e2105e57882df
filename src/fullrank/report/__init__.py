"""The report: a table with what it is of, its figures, its page, its terminal rendering."""

from fullrank.report.overlay import Overlay
from fullrank.report.report import Report
from fullrank.report.screened import LossChange, Restored, Screened
from fullrank.report.screening import Screening
from fullrank.report.spectrum import HeadSpectrum
from fullrank.report.variants import Variants

__all__ = ["HeadSpectrum", "LossChange", "Overlay", "Report", "Restored", "Screened", "Screening", "Variants"]
