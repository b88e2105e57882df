"""Remedies of the residual stream: branches, skips and norms."""
