"""Polarised channels: some of a state space's memory keeps all, some of it nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.capture.wrappers import bare
from fullrank.edit import Edit, replace_module, together
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient
from fullrank.remedies.remedy import remedy
from fullrank.zoo import Decay, StateSpace
from fullrank.zoo.state_space import StateSpaceMixer

__all__ = ["polarise"]


class _Polarised:
    """Ā of the first channels is 1 and of the last 0.

    Args:
        ones: how many of the first.
        zeros: how many of the last.
    """

    def __init__(self, ones: int, zeros: int) -> None:
        self._ones, self._zeros = ones, zeros

    def __call__(self, run: Callable[[Tensor], Tensor], steps: Tensor) -> Tensor:
        A_bar = run(steps)
        between = A_bar[..., self._ones : A_bar.shape[-1] - self._zeros]
        ends = [A_bar.new_full((*A_bar.shape[:-1], n), value) for n, value in ((self._ones, 1.0), (self._zeros, 0.0))]
        return torch.cat([ends[0], between, ends[1]], -1)


@remedy(
    "polarise",
    "channels of a state space that keep all, and channels that keep nothing",
    addresses=("rank-collapse-depth", "context-dilution"),
    acts_on="state space",
    exactness="changes-function",
    formula="Ā_t = 1 in the `ones` first channels of every feature, 0 in the `zeros` last, e^{−Δ_t a} in those between",
    papers=(
        "Wang, Cai, Wang, Zhu, Srivastava, Wang, Li: Understanding and Mitigating Bottlenecks of State Space Models "
        "through the Lens of Recency and Over-smoothing, ICLR 2025, arXiv 2501.00658",
    ),
    keys=("ssm_oversmoothing",),
    parameters=(
        Parameter("ones", "channels that keep all, of the slowest", 1, kind="integer", low=0),
        Parameter("zeros", "channels that keep nothing, of the fastest", 1, kind="integer", low=0),
    ),
    limits=(
        "For fullrank.zoo.StateSpace alone.",
        "Takes the channels from those that there are, where the paper's code adds one of each to 16.",
        "A zero channel is exactly 0 here; in the paper's code it is exp(−100Δ), which is .905 at Δ = .001.",
        "A one channel sums what is written without end; where (1 − Ā) of it is written it would hold nothing, and is "
        "refused.",
    ),
    cost="none; the decay rates of the channels that are set are not trained",
)
def polarise(patient: Patient, *, ones: int = 1, zeros: int = 1) -> Edit:
    """Set the decay of the first and the last channels."""
    model = bare(patient.model)
    if not isinstance(model, StateSpace):
        raise RemedyError(
            f"it changes the decay of fullrank.zoo.StateSpace, and a {type(model).__name__} has none that it knows."
        )
    if ones + zeros == 0:
        raise RemedyError("ones=0 and zeros=0 change nothing.")
    if ones + zeros > model.config.states:
        raise RemedyError(
            f"ones={ones} and zeros={zeros} are more than the {model.config.states} channels that there are."
        )
    if ones and model.config.write == "convex":
        raise RemedyError(
            "ones= must be 0 where (1 − Ā) of a token is written (write='convex'): a channel that keeps all would be "
            "written nothing."
        )
    paths = [
        f"{name}.{part}" if name else part
        for name, mixer in model.named_modules()
        if isinstance(mixer, StateSpaceMixer)
        for part, module in mixer.named_children()
        if isinstance(module, Decay)
    ]
    return together(replace_module(patient.model, path, _Polarised(ones, zeros)) for path in paths)
