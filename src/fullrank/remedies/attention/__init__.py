"""Remedies at the attention call, and what several of them are made of."""
