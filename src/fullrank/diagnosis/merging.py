"""Heads that write alike made one: by how much the head that stays is multiplied, measured over all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fullrank.capture import Anatomy
from fullrank.capture.padding import RealTokens
from fullrank.diagnosis.intervention import Intervention
from fullrank.diagnosis.interventions import groups_of, real_in, stack_of
from fullrank.edit import Call, Edit, rewrite_attention
from fullrank.errors import EditError
from fullrank.measure.heads import output_blocks, output_weights

__all__ = ["Merging"]


class Merging:
    """Least squares: the factor f of the head that stays, so that f Y_k is nearest to the sum of what a group writes.

    f = 1 + Σ_h ⟨Y_h, Y_k⟩ / |Y_k|² over the heads h that are dropped, with Y_h = Z_h W_O^h over all real tokens of all
    documents: one number a group, as multiplying the columns of W_O would be. What is not on the line of Y_k is lost:
    √(1 − c²) of a head of cosine c. What heads write is never formed; the cost of a call is that of one product of each
    head's output with a matrix of its own width.

    Args:
        model: the model.
        anatomy: what `capture.survey` found.
        intervention: `merge-heads`, with its groups.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, intervention: Intervention) -> None:
        self._model, self._anatomy, self._how = model, anatomy, intervention
        self._W_O: Tensor | None = None  # (heads, d_v, width), read at the first call
        self._sums: list[Tensor] = []  # of each group ⟨Σ Y_h, Y_k⟩ and |Y_k|²

    def watch(self, real: Tensor | Mapping[str, Tensor] | None = None) -> Edit | str:
        """Put something into the model that changes nothing and takes in what the heads write, for one batch.

        Args:
            real: as `apply`.

        Returns:
            The edit in force, to be undone; or a sentence why W_O or the call are not seen.
        """
        told, how = RealTokens(self._anatomy, real), self._how
        try:
            stack, groups = stack_of(self._anatomy, how), groups_of(how)

            def see(call: Call, output: Tensor) -> Tensor:
                self._add(output, groups, real_in(call, self._anatomy, stack, told)[0], call.place.path)
                return output

            return rewrite_attention(
                self._model, self._anatomy, after=see, stack=how.stack, layer=how.layer, part=how.part
            )
        except EditError as reason:
            return str(reason)

    def factors(self) -> tuple[float, ...]:
        """What to multiply the heads that stay by, over all that was watched.

        Returns:
            One number a group.

        Raises:
            EditError: where a head that would stay writes nothing, or nothing was watched.
        """
        if not self._sums:
            raise EditError("what the heads write was not seen.")
        found = torch.stack(self._sums).sum(0).tolist()
        if any(square <= 0 for _, square in found):
            raise EditError("a head that would stay writes nothing.")
        return tuple(1 + inner / square for inner, square in found)

    def _add(self, output: Tensor, groups: Sequence[Sequence[int]], real: Tensor | None, path: str) -> None:
        how, heads = self._how, output.shape[1]
        if any(not 0 <= head < heads for group in groups for head in group):
            raise EditError(f"groups={groups}, but attention in {path} has heads 0 to {heads - 1}.")
        if self._W_O is None:
            weight = output_weights(self._anatomy).get((how.stack, how.layer, how.part))
            reason, self._W_O = output_blocks(self._model, weight, heads=heads, width=output.shape[-1])
            if self._W_O is None:
                raise EditError(f"what the heads in {path} write is not known: {reason}.")
        dtype = torch.promote_types(output.dtype, torch.float32)
        Z, W_O = output.detach().to(dtype), self._W_O.to(output.device, dtype)
        if real is not None:
            Z = torch.where(real[:, None, :, None], Z, 0)
        sums = []
        for kept, *dropped in groups:
            inner = [
                ((Z[:, head] @ (W_O[head] @ W_O[kept].mT)) * Z[:, kept]).double().sum() for head in (kept, *dropped)
            ]
            sums.append(torch.stack([torch.stack(inner[1:]).sum(), inner[0]]))
        self._sums.append(torch.stack(sums))
