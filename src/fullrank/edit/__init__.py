"""Changing a forward and undoing it: blocks, attention calls, branches, states, weights."""

from fullrank.edit.attention import replace_heads, rewrite_attention
from fullrank.edit.block import rewrite_block
from fullrank.edit.branches import Branch, Branches, find_branches
from fullrank.edit.call import Call
from fullrank.edit.carried import Carried, carry
from fullrank.edit.forwards import edits_in
from fullrank.edit.handle import Edit, together
from fullrank.edit.norms import Norm, Norms, find_norms
from fullrank.edit.places import Place
from fullrank.edit.replaced import replace_module
from fullrank.edit.residual import rewrite_residual
from fullrank.edit.scale import scale_branch
from fullrank.edit.stream import replace_stream, skip_block
from fullrank.edit.weights import reparametrize, replace_weight

__all__ = [
    "Branch",
    "Branches",
    "Call",
    "Carried",
    "Edit",
    "Norm",
    "Norms",
    "Place",
    "carry",
    "edits_in",
    "find_branches",
    "find_norms",
    "reparametrize",
    "replace_heads",
    "replace_module",
    "replace_stream",
    "replace_weight",
    "rewrite_attention",
    "rewrite_block",
    "rewrite_residual",
    "scale_branch",
    "skip_block",
    "together",
]
