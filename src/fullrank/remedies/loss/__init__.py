"""Remedies that add a term to the loss."""
