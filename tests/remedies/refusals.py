"""Which remedies do not fit which of the patients, and a part of the sentence that says why."""

from __future__ import annotations

REFUSED: dict[tuple[str, str], str] = {}
"""(remedy, patient) → words of the reason. Everything that is not here must work."""

VARIANTS: dict[str, tuple[str, ...]] = {}
"""Remedy → further settings that go through the same contract, such as `temperature?kind=log-context`."""
