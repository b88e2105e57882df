"""Remedies of state-space models."""
