"""Numbers of the batch as a whole: energy by who shares it, similarity across sequences, gaps between samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from fullrank import metrics
from fullrank.measure.samples import Place, Samples
from fullrank.metrics.accumulate import mean_token, real_tokens
from fullrank.metrics.tokens import unit_tokens
from fullrank.table import Row

__all__ = ["Energy", "Parts", "parts_of", "residual_of", "rms_of", "similarity_of"]

_TOKENS = 2048  # that are squared at a time
_ALONE = "needs at least two independent sequences: with one, what all share and what it shares are the same"
_SINGLE = "needs at least two real tokens in a sequence: one token is its own mean"


Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Per sequence: tokens, their sum, energy around their mean, tokens that are not zero, sum of their unit vectors."""


class Energy:
    """Sufficient statistics per sequence of the three energy shares and of `similarity_across`.

    With S_b the token sum of sequence b, n_b its tokens, m the mean over all tokens and E = Σ‖x‖²:
    shared N‖m‖²/E, sequence Σ n_b‖x̄_b − m‖²/E, token Σ‖x_bt − x̄_b‖²/E, which add to 1. Kept per sequence are n_b, S_b,
    the token part (centred before it is squared, so that it survives when it is small) and the sum of unit vectors:
    any number of batches and processes is merged exactly. The standard error is the jackknife over sequences.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[Place, str], list[Parts]] = {}
        self._notes: dict[tuple[Place, str], str] = {}

    def add(self, place: Place, parts: Parts, scope: str, *, note: str = "") -> None:
        """Take in `parts_of` one batch, and what to know of its token part."""
        if note:
            self._notes[place, scope] = note
        self._parts.setdefault((place, scope), []).append(parts)

    def merge(self, other: Self) -> None:
        """Append the sequences of another."""
        for key, parts in other._parts.items():
            self._parts.setdefault(key, []).extend(parts)
        self._notes |= other._notes

    def rows(self) -> list[Row]:
        """The three shares and `similarity_across` for every place and scope; the gaps over `samples` for blocks."""
        rows = []
        for (place, scope), parts in self._parts.items():
            whole: Parts = tuple(torch.cat([part[i].cpu() for part in parts]) for i in range(5))  # type: ignore[assignment]
            keep = whole[0] > 0
            n, S, token, directed, units = (one[keep] for one in whole)
            for metric, statistic in _STATISTICS.items():
                row = _row(place, scope, metric, statistic, (n, S, token, directed, units))
                if metric == "token_energy" and row.value is not None:
                    row = replace(row, note=self._notes.get((place, scope), ""))
                rows.append(row)
            if scope == "all" and (place.site, place.part) == ("stream", "out"):
                rows.extend(_gaps(place, S / n.unsqueeze(-1)))
        return rows


def parts_of(X: Tensor, mask: Tensor | None) -> Parts:
    """What the shares, and the plainest numbers of single sequences, are made of: two passes over the tokens.

    Args:
        X: (sequences, tokens, width).
        mask: (sequences, tokens), or None where all are real.

    Returns:
        One number or vector per sequence of each kind.
    """
    X, real = real_tokens(X, mask)
    n = real.sum(-1)  # (sequences,)
    x_bar = mean_token(X, real)
    # squares in float64: those of a collapsing or exploding stream leave the range of float32
    token = torch.zeros_like(n, dtype=torch.float64)
    for some, kept in zip(X.split(_TOKENS, 1), real.split(_TOKENS, 1), strict=True):
        centred = some - x_bar
        if mask is not None:
            centred = torch.where(kept[..., None], centred, 0)
        token += centred.double().square().sum((1, 2))
    U = unit_tokens(X)
    directed = (U != 0).any(-1).sum(-1)
    return n.double(), X.sum(1, dtype=torch.float64), token, directed.double(), U.sum(1, dtype=torch.float64)


def rms_of(parts: Parts) -> Tensor:
    """`rms` of each sequence: √((Σ‖x_t − x̄‖² + n‖x̄‖²) / (n d))."""
    n, S, token, _, _ = parts
    return ((token + S.square().sum(-1) / n) / (n * S.shape[-1])).sqrt()


def residual_of(parts: Parts) -> Tensor:
    """`residual` of each sequence: √(Σ‖x_t − x̄‖² / Σ‖x_t‖²); NaN for fewer than two tokens."""
    n, S, token, _, _ = parts
    share = (token / (token + S.square().sum(-1) / n)).sqrt()
    return torch.where(n >= 2, share, torch.nan)


def similarity_of(parts: Parts) -> Tensor:
    """`similarity` of each sequence: (‖Σ u_t‖² − T) / (T (T − 1)) over the T tokens that have a direction."""
    T, units = parts[3], parts[4]
    rho = ((units.square().sum(-1) - T) / (T * (T - 1))).clamp(max=1)
    return torch.where(T >= 2, rho, torch.nan)


def _shares(n: Tensor, S: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = S.sum(0) / n.sum()
    shared = n.sum() * m.square().sum()
    sequence = (n * (S / n.unsqueeze(-1) - m).square().sum(-1)).sum()
    own = token.sum()
    total = shared + sequence + own
    return shared / total, sequence / total, own / total


def _similarity_across(n: Tensor, units: Tensor) -> Tensor:
    pairs = n.sum().square() - n.square().sum()
    rho: Tensor = (units.sum(0).square().sum() - units.square().sum()) / pairs
    return rho.clamp(-1, 1)


_STATISTICS: dict[str, Callable[[Parts], Tensor]] = {
    "shared_energy": lambda p: _shares(*p[:3])[0],
    "sequence_energy": lambda p: _shares(*p[:3])[1],
    "token_energy": lambda p: _shares(*p[:3])[2],
    "similarity_across": lambda p: _similarity_across(p[3], p[4]),
}


def _row(place: Place, scope: str, metric: str, statistic: Callable[[Parts], Tensor], parts: Parts) -> Row:
    sequences = parts[0].numel()
    value: float | None = None
    stderr: float | None = None
    note = _ALONE
    if sequences > 1 or (metric == "token_energy" and sequences == 1):
        value = float(statistic(parts))
        note = ""
        if math.isnan(value):
            value, note = None, "the stream is zero at every token"
    if sequences and bool((parts[0] < 2).all()) and metric != "similarity_across":
        value, note = None, _SINGLE
    if sequences > 2 and value is not None:
        left_out = [
            statistic(tuple(torch.cat([part[:b], part[b + 1 :]]) for part in parts))  # type: ignore[arg-type]
            for b in range(sequences)
        ]
        spread = torch.stack(left_out)
        stderr = float(((sequences - 1) / sequences * (spread - spread.mean()).square().sum()).sqrt())
    return Row(
        stack=place.stack,
        layer=place.layer,
        site=place.site,
        part=place.part,
        metric=metric,
        value=value,
        scope=scope,
        stderr=stderr,
        n=sequences,
        note=note,
    )


def _gaps(place: Place, means: Tensor) -> list[Row]:
    """Orthogonality and isometry gap of the sequences' means, each sequence being one sample."""
    samples = Samples()
    for metric, gap in (("orthogonality_gap", metrics.orthogonality_gap), ("isometry_gap", metrics.isometry_gap)):
        value = gap(means.unsqueeze(0)) if means.shape[0] > 1 else torch.full((1,), torch.nan)
        samples.add(place, metric, value, scope="samples", undefined="needs at least two independent sequences")
    return [replace(row, n=means.shape[0]) for row in samples.rows()]
