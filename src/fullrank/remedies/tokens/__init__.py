"""Fewer tokens for later blocks."""
