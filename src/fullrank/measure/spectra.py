"""The singular values of attention maps: the gap, the bulk, and what centring leaves."""

from __future__ import annotations
