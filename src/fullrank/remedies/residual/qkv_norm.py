"""QKV-norm: queries, keys and values are normalised after their projections, and not the state before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fullrank.edit import Call, Edit, replace_module, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy
from fullrank.remedies.residual.norm_changes import as_given, norms_in

__all__ = ["QKVNorm", "qkv_norm"]


class QKVNorm:
    """q, k, v ← each head's at rms 1, and scores over √d_k.

    Args:
        eps: added to the mean square.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, call: Call) -> Call:
        """The call on normalised queries, keys and values."""
        assert call.query is not None
        assert call.key is not None
        return call.change(
            query=self._normalised(call.query),
            key=self._normalised(call.key),
            value=self._normalised(call.value),
            scale=call.query.shape[-1] ** -0.5,
        )

    def _normalised(self, X: Tensor) -> Tensor:
        wide = X.to(torch.promote_types(X.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(X.dtype)


@remedy(
    "qkv-norm",
    "norms after the projections of attention",
    addresses=("entropy-collapse", "query-key-starvation"),
    acts_on="norm",
    exactness="changes-function",
    formula="q, k, v ← W_Q x/rms(W_Q x), W_K x/rms(W_K x), W_V x/rms(W_V x) in each head, in place of W_Q N(x), …; "
    "scores over √d_k",
    papers=(
        "Menary, Kaski, Freitas: Transformer Normalisation Layers and the Independence of Semantic Subspaces, "
        "arXiv 2406.17837",
    ),
    keys=("semantic_subspaces",),
    parameters=(Parameter("eps", "added to the mean square", 1e-6, low=0.0, high=1.0),),
    limits=(
        "For models whose attention reads through a norm of its own (pre-norm); the norm of the MLP stays. Others "
        "are refused, and those that softmax by themselves, whose queries and keys are not seen. Beside such a stack "
        "others stay as they are; the first block of one may read what the embedding has normalised.",
        "To be trained from here: a trained model has learnt to read normalised states. Gains are left to the "
        "projections.",
        "Rotary positions turn queries and keys before they are normalised, which changes no length.",
        "Worse outside the training distribution, as third parties report; the paper was not read, and whether it "
        "normalises heads or all of them together is not known.",
    ),
    cost="three norms of heads in place of one of the state; fused kernels stay; no parameters",
)
def qkv_norm(patient: Patient, *, eps: float = 1e-6) -> Edit:
    """Take the norm before attention out, and normalise queries, keys and values."""
    name = type(patient.model).__name__
    norms = norms_in(patient, "read", why="qkv-norm puts the one before attention after its projections")
    mine = {}
    for path, found in norms.items():
        branches = {norm.branch.split(".")[0] for norm in found}
        if "attention" not in branches:
            continue
        if branches != {"attention"}:
            raise RemedyError(
                f"the norm {path} of this {name} is read by the MLP too, which needs it; qkv-norm is for attention "
                "with a norm of its own."
            )
        mine[path] = found
    if not mine:
        raise RemedyError(f"attention of this {name} does not read through a norm that could be put elsewhere.")
    sites, left = _chosen(patient, {(norm.stack, norm.layer) for found in mine.values() for norm in found})
    for site in sites:
        if site.first.width is None:
            raise RemedyError(f"attention in {site.path} softmaxes by itself and shows no queries and keys.")

    def edits() -> Iterator[Edit]:
        for path in mine:
            yield replace_module(patient.model, path, as_given)
        yield patient.rewrite("qkv-norm", before=lambda site: QKVNorm(eps), sites=sites)

    edit = together(edits())
    edit.notes = tuple(
        f"self-attention of {stack} layer {', '.join(map(str, layers))} reads through no norm and is left as it is."
        for stack, layers in left.items()
    )
    return edit


def _chosen(patient: Patient, normed: set[tuple[str, int]]) -> tuple[list[Site], dict[str, list[int]]]:
    """The self-attention of layers that read through a norm, and of the first one of their stack; and what is left."""
    stacks = {stack for stack, _ in normed}
    sites, left = [], dict[str, list[int]]()
    for site in patient.self_attention:
        bare = [(one.place.stack, one.place.layer) for one in site.calls]
        bare = [at for at in bare if at not in normed and not (at[1] == 1 and at[0] in stacks)]
        if not bare:
            sites.append(site)
        elif len(bare) < len(site.calls):
            raise RemedyError(f"attention in {site.path} serves several layers, and only some have a norm before it.")
        for stack, layer in bare:
            left.setdefault(stack, []).append(layer)
    return sites, left
