"""What can be done to a model for the length of a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Intervention", "Kind"]

Kind = Literal["skip-block", "zero-head", "mean-head", "merge-heads", "mask-sink", "stream-means", "deflate-attention"]


@dataclass(frozen=True)
class Intervention:
    """One change of a forward, as data.

    Attributes:
        kind: `skip-block`: a block hands its input on. `zero-head`, `mean-head`: what heads write is replaced by 0, or
            by its mean over the sequence's real tokens (what each query has seen, where attention is causal).
            `merge-heads`: of each group all heads but the first are dropped, and that one is multiplied instead.
            `mask-sink`: keys of one position are hidden from all other queries, rows renormalised. `stream-means`: the
            stream after a layer is replaced by each sequence's mean token. `deflate-attention`: the leading singular
            triplet of each head's map is taken out; no verdict is tested by it, and it is there for use by hand.
        stack: of the model.
        layer: from 1 (for `stream-means` from 0).
        heads: which heads; empty for all.
        part: the attention call.
        position: of `mask-sink`: the key.
        also: layers that are treated alike in the same forward, such as every block that is skipped together.
        groups: of `merge-heads`: heads that write alike, the one that stays first.
        factors: of each group, by what the head that stays is multiplied; empty where that is still to be measured.
    """

    kind: Kind
    stack: str
    layer: int
    heads: tuple[int, ...] = ()
    part: str = "self"
    position: int = 0
    also: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    factors: tuple[float, ...] = ()

    @property
    def words(self) -> str:
        """What is done, for a sentence."""
        layers = sorted({self.layer, *self.also})
        where = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        heads = f" head{'s' if len(self.heads) > 1 else ''} {', '.join(map(str, self.heads))}" if self.heads else ""
        stay, spare = _listed([one[0] for one in self.groups]), _listed([h for one in self.groups for h in one[1:]])
        done = {
            "skip-block": f"{where} skipped",
            "zero-head": f"{where}{heads} silenced",
            "mean-head": f"{where}{heads} replaced by the mean over tokens",
            "merge-heads": f"{where} {spare} dropped and {stay} scaled instead",
            "mask-sink": f"key {self.position} hidden in {where}{heads}",
            "stream-means": f"the stream after {where} replaced by its sequence means",
            "deflate-attention": f"the leading singular direction of attention taken out of {where}{heads}",
        }
        return done[self.kind]


def _listed(heads: list[int]) -> str:
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"
