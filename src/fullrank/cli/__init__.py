"""The command line. Importing it loads neither torch nor transformers: each command imports what it runs."""

from fullrank.cli.app import app, main

__all__ = ["app", "main"]
