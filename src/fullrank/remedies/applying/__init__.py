"""Putting remedies in force: asked for, applied, proved, recorded, undone."""
