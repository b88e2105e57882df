"""The table of theories in docs/predicting.md, from the catalogue itself.

Run `python tests/theory/theories_table.py` to write it anew.
"""

import re
from pathlib import Path

from fullrank.theory.catalogue import THEORIES

PAGE = Path(__file__).parents[2] / "docs" / "predicting.md"
BEGIN, END = "<!-- theories: written by tests/theory/theories_table.py -->", "<!-- end of theories -->"


def title(words):
    """The title with its paper as a link."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", words[:1].upper() + words[1:])


def table():
    """One section per theory: its paper, what it gives, what it assumes."""
    parts = []
    for one in THEORIES:
        gives = ", ".join(f"`{metric}`" for metric in one.gives)
        assumes = "; ".join(assumption.says for assumption in one.assumes)
        parts += [f"**{one.key}**: {title(one.title)}.", f"Gives {gives}.", f"Assumes: {assumes}.", ""]
    return "\n".join(parts).rstrip()


def page(text):
    """The page with its table of now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
