"""What remedies of the loss add to it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["Penalty", "penalty_of"]


class Penalty(nn.Module, ABC):
    """A term of the training loss that a remedy has put into a model, of the latest forward."""

    @abstractmethod
    def value(self) -> Tensor | None:
        """The term of the latest forward with its gradient graph, a scalar; None before the first one."""


def penalty_of(model: nn.Module) -> Tensor:
    """The sum of what all remedies in a model add to the loss of its latest forward; 0 where there are none.

    Args:
        model: the model, repaired or not.

    Returns:
        A scalar with its graph.
    """
    found = [one.value() for one in model.modules() if isinstance(one, Penalty)]
    terms = [term for term in found if term is not None]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.stack([term.float() for term in terms]).sum() if terms else torch.zeros((), device=device)
