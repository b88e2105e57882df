"""What remedies of the loss add to it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["Penalty", "penalty_of"]


class Penalty(nn.Module, ABC):
    """A term of the training loss that a remedy has put into a model, of the latest forward.

    Attributes:
        in_loss: whether the loss that the model returned in its latest forward has the term already.
    """

    in_loss: bool = False

    @abstractmethod
    def value(self) -> Tensor | None:
        """The term of the latest forward with its gradient graph, a scalar; None before the first one."""

    def forget(self) -> None:
        """Keep nothing of the latest forward."""
        self.in_loss = False


def penalty_of(model: nn.Module) -> Tensor:
    """The sum of what remedies in a model have still to add to the loss of its latest forward.

    A term that the model has added to the loss which it returned, as it does in training, does not count again: adding
    this is right beside the model's own loss and beside any other. It is 0 as well where you pass labels, so that the
    model returns a loss, and differentiate another one: call the model without labels there.

    Args:
        model: the model, repaired or not.

    Returns:
        A scalar with its graph; 0 where there is nothing to add.
    """
    found = [one.value() for one in model.modules() if isinstance(one, Penalty) and not one.in_loss]
    terms = [term for term in found if term is not None]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.stack([term.float() for term in terms]).sum() if terms else torch.zeros((), device=device)
