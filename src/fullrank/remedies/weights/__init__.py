"""Remedies of the weights: drawn anew, rescaled, held to a form."""
