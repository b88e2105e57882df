"""Named failures: references, interventions, one file per failure; rows in, verdicts out."""

from fullrank.diagnosis.diagnose import Tester, diagnose
from fullrank.diagnosis.evidence import Evidence
from fullrank.diagnosis.failure import Failure, Looked, Suspicion, Test
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.thresholds import THRESHOLDS, Threshold, threshold

__all__ = [
    "THRESHOLDS",
    "Evidence",
    "Failure",
    "Intervention",
    "Looked",
    "Suspicion",
    "Test",
    "Tester",
    "Threshold",
    "diagnose",
    "threshold",
]
