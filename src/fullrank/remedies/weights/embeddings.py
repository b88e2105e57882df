"""Tables of embeddings whose sum is the stream at its start."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fullrank.capture.wrappers import bare
from fullrank.remedies.patient import Patient

__all__ = ["Table", "tables"]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        parameter: its name in the model.
        tied: whether it is the weight of the head too.
    """

    parameter: str
    tied: bool


def tables(patient: Patient) -> tuple[Table, ...]:
    """Embeddings of the stream's width that stand outside of blocks: of words, of positions, of segments.

    Positions that are plain parameters and maps of patches are none of them.

    Args:
        patient: the model.

    Returns:
        Each tensor once.
    """
    model = bare(patient.model)
    stacks = patient.anatomy.stacks
    widths = {stack.width for stack in stacks}
    blocks = [f"{path}." for stack in stacks for path in stack.paths]
    heads = {stack.unembed.parameter for stack in stacks if stack.unembed is not None}
    names = dict(model.named_parameters(remove_duplicate=False))
    read = {id(names[name]) for name in heads if name in names}
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module._parameters.values()
        if parameter is not None
    }
    found: dict[int, Table] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim in widths and not path.startswith(tuple(blocks)):
            key = id(module.weight)
            found.setdefault(key, Table(f"{path}.weight" if path else "weight", key in read | others))
    return tuple(found.values())
