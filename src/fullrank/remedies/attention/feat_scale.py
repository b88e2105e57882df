"""FeatScale: gains per feature for the mean and the rest of what attention adds to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullrank.edit import Branch, Call, Edit, rewrite_residual, together
from fullrank.edit.places import module_at
from fullrank.errors import RemedyError
from fullrank.remedies.attention.visible_mean import Visible, visible_of
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["feat_scale"]


class _Sight:
    """Who saw whom in the attention call of a block that runs."""

    visible: Visible | None = None


@dataclass(frozen=True)
class _Note:
    """Behind a kernel: notes who sees whom, and changes nothing."""

    sight: _Sight

    def __call__(self, call: Call, output: Tensor) -> Tensor:
        self.sight.visible = visible_of(call)
        return output


class FeatScale(nn.Module):
    """F ← F + diag(s) DC(F) + diag(t) HC(F), where DC averages over what each token sees and HC is the rest.

    Args:
        width: of the stream.
        sight: who sees whom.
        low: s at first.
        high: t at first.
    """

    def __init__(self, width: int, sight: _Sight, low: float, high: float) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.full((width,), low))
        self.t = nn.Parameter(torch.full((width,), high))
        self.sight = sight

    def forward(self, X: Tensor, F: Tensor) -> Tensor:
        """X and what attention adds to it, the latter scaled.

        Args:
            X: (sequences, tokens, width).
            F: what is added.

        Returns:
            The stream.

        Raises:
            RemedyError: where the tokens of the two are not those of the attention call.
        """
        visible, self.sight.visible = self.sight.visible, None
        if visible is None or visible.queries != visible.keys or visible.keys != F.shape[1]:
            seen = "none" if visible is None else f"{visible.queries} queries for {visible.keys} keys"
            raise RemedyError(
                f"feat-scale averages over all visible tokens of a branch with {F.shape[1]}, and attention had {seen}; "
                "run without a key-value cache (use_cache=False); attention in windows does not fit."
            )
        mask = visible.mask
        one = (
            visible
            if mask is None
            else Visible(visible.queries, visible.keys, mask[:, :1], visible.causal, visible.window)
        )
        low = one.mean(F[:, None])[:, 0]
        return X + F + (self.s.to(F.dtype) * low + self.t.to(F.dtype) * (F - low))


@remedy(
    "feat-scale",
    "gains per feature for the mean and the rest of what attention adds",
    addresses=("rank-collapse-depth", "averaging-heads"),
    acts_on="attention",
    exactness="identity-now",
    formula=(
        "F ← F + diag(s) DC[F] + diag(t) HC[F], F what attention adds to the stream, DC[F] = UF, HC[F] = F − "
        "UF; U_ts = 1/#visible(t) (ViT: the token mean); s = t = 0 at first, one per feature and layer"
    ),
    papers=("Wang, Zheng, Chen, Wang: Anti-Oversmoothing in Deep Vision Transformers, ICLR 2022, arXiv 2203.05962",),
    keys=("oversmoothing_fixes",),
    parameters=(
        Parameter("low", "s at first; 0 leaves the function as it is", 0.0, low=-1.0, high=100.0),
        Parameter("high", "t at first; 0 leaves the function as it is", 0.0, low=-1.0, high=100.0),
    ),
    limits=(
        "Does nothing until it is trained, or started elsewhere than at 0.",
        "The released code adds its terms twice; this does once, as the paper's formula says: 2s and 2t there are s "
        "and t here.",
        "Acts on what reaches the stream, after dropout and branch factors; blocks that add attention and MLP as one "
        "sum do not fit.",
        "Does not run with a key-value cache: means over earlier tokens would be missing.",
        "Where heads see different tokens, U is that of the first head.",
    ),
    cost="a mean over the branch per layer (see center-attention); fused kernels stay; 2 parameters per feature",
)
def feat_scale(patient: Patient, *, low: float = 0.0, high: float = 0.0) -> Edit:
    """Put gains on the two parts of what every self-attention adds to its stream."""
    sites = {(call.place.stack, call.place.layer): site for site in patient.self_attention for call in site.calls}
    branches = [one for one in patient.branches if one.name == "attention" and (one.stack, one.layer) in sites]
    if len(branches) < len(sites):
        reasons = patient.branches.reason or "the attention of a block is not one branch of its own."
        raise RemedyError(f"feat-scale does not know what attention adds to the stream: {reasons}")
    sights = {site.path: _Sight() for site in sites.values()}

    def note(site: Site) -> _Note:
        return _Note(sights[site.path])

    def edits() -> Iterator[Edit]:
        yield patient.rewrite("feat-scale", after=note, sites=tuple({s.path: s for s in sites.values()}.values()))
        for path, layers in _by_block(patient, branches).items():
            first = layers[0]
            site = sites[first.stack, first.layer]
            made = FeatScale(_width(site), sights[site.path], low, high)
            dtype = next((p.dtype for p in module_at(patient.model, path).parameters() if p.is_floating_point()), None)
            made.to(device=site.first.device, dtype=dtype or site.first.dtype)
            yield rewrite_residual(
                patient.model,
                patient.anatomy,
                patient.branches,
                made,
                stack=first.stack,
                layer=first.layer if len(layers) == 1 else None,
                branch="attention",
                name="fullrank_feat_scale",
            )

    return together(edits())


def _by_block(patient: Patient, branches: list[Branch]) -> dict[str, list[Branch]]:
    """The branches of each block module; several where one is called for several layers."""
    found: dict[str, list[Branch]] = {}
    paths = {stack.name: stack.paths for stack in patient.anatomy.stacks}
    for one in branches:
        found.setdefault(paths[one.stack][one.layer - 1], []).append(one)
    return found


def _width(site: Site) -> int:
    if site.first.input_width is None:
        raise RemedyError(f"feat-scale does not know the width of the stream at {site.path}.")
    return site.first.input_width
