"""What gives a centred attention branch its energy back: a gain per head, measured once, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fullrank.capture import undisturbed
from fullrank.edit import Call, Edit
from fullrank.errors import RemedyError
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site

__all__ = ["GAINS", "Centre", "centred_attention"]

Centre = Callable[[Call, Tensor], Tensor]
"""Takes the mean out of what heads hand on, (batch, heads, queries, width)."""

GAINS = (
    Parameter(
        "gain",
        "what of the branch's energy is restored per head and layer, measured on the batch at the moment of applying: "
        "none of it, that of the uncentred branch (energy: g = ‖AV‖/‖centred‖), or that of the values (values: g = "
        "√(queries/keys) ‖V‖/‖centred‖)",
        "none",
        kind="choice",
        choices=("none", "energy", "values"),
    ),
    Parameter("factor", "a number that the gain is multiplied by", 1.0, above=0.0, high=1e6),
    Parameter("learn", "whether the gains are parameters, to be trained from there", False, kind="switch"),
)
"""Parameters of the remedies that centre."""


class CentredBranch(nn.Module):
    """O_h ← g_h · centred(O_h).

    Args:
        centre: takes the mean out.
        gain: (heads,), or None for 1.
        learn: whether gains are parameters; buffers otherwise.
    """

    gain: Tensor | None

    def __init__(self, centre: Centre, gain: Tensor | None, learn: bool) -> None:
        super().__init__()
        self.centre = centre
        if learn:
            assert gain is not None
            self.gain = nn.Parameter(gain)
        else:
            self.register_buffer("gain", gain)

    def forward(self, call: Call, output: Tensor) -> Tensor:
        """The output (batch, heads, queries, width), centred."""
        rest = self.centre(call, output)
        return rest if self.gain is None else rest * self.gain.to(rest.dtype)[:, None, None]


def centred_attention(
    patient: Patient, name: str, centre: Centre, *, gain: str, factor: float, learn: bool, sites: tuple[Site, ...]
) -> Edit:
    """Put a `CentredBranch` behind every kernel.

    Args:
        patient: the model.
        name: of the remedy.
        centre: takes the mean out.
        gain: none, energy or values.
        factor: that gains are multiplied by.
        learn: whether gains are parameters.
        sites: where.

    Returns:
        The edit.

    Raises:
        RemedyError: where a head has nothing left that a gain could restore.
    """
    measured = {} if gain == "none" else _measured(patient, name, centre, gain, factor, sites)

    def make(site: Site) -> CentredBranch:
        own = measured.get(site.path)
        if own is None:
            own = torch.full((site.first.heads,), factor) if learn or factor != 1 else None
        return CentredBranch(centre, own, learn)

    return patient.rewrite(name, after=make, sites=sites)


def _measured(
    patient: Patient, name: str, centre: Centre, gain: str, factor: float, sites: tuple[Site, ...]
) -> Mapping[str, Tensor]:
    """Gains by site, found in one forward in which every layer reads what those before it make with their gains."""
    found: dict[str, _Measure] = {site.path: _Measure(centre, gain, factor) for site in sites}
    edit = patient.rewrite(f"{name} measured", after=lambda site: found[site.path], sites=sites)
    with edit, undisturbed(patient.model), torch.no_grad():
        patient.forward()
    for path, one in found.items():
        lost = float((one.after / one.before.clamp(min=1e-300)).min()) ** 0.5
        if lost <= one.floor:
            raise RemedyError(
                f"{name} cannot restore the energy of {path}: a head there only averages (centring leaves {lost:.1g} "
                "of its norm); use gain=none, or give queries and keys a larger scale first."
            )
    return {path: one.gain for path, one in found.items()}


class _Measure:
    """Centres with the gain that its calls so far ask for, and remembers it."""

    def __init__(self, centre: Centre, kind: str, factor: float) -> None:
        self._centre, self._kind, self._factor = centre, kind, factor
        self.before = self.after = torch.zeros(())
        self.floor = 0.0

    @property
    def gain(self) -> Tensor:
        return self._factor * (self.before / self.after.clamp(min=1e-300)).sqrt()

    def __call__(self, call: Call, output: Tensor) -> Tensor:
        rest = self._centre(call, output)
        rows, keys = _tokens_seen(call)
        whole = _energy(output, rows)
        if self._kind == "values":
            per_token = _energy(call.value, keys) / _number(call.value, keys)
            groups = output.shape[1] // call.value.shape[1]
            whole = per_token.repeat_interleave(groups) * _number(output, rows)
        self.before, self.after = self.before.to(whole) + whole, self.after.to(whole) + _energy(rest, rows)
        self.floor = max(self.floor, 4 * torch.finfo(output.dtype).eps)
        return rest * self.gain.to(rest.dtype)[:, None, None]


def _tokens_seen(call: Call) -> tuple[Tensor | None, Tensor | None]:
    # (batch, heads or 1, tokens) of queries and of keys that are no padding: a key that some query sees is real, and
    # so is a query that sees something and, where queries are the keys, is seen
    visible = call.visible()
    if visible is None:
        return None, None
    keys = visible.any(-2)
    rows = visible.any(-1)
    return (rows & keys if call.queries == call.keys else rows), keys


def _energy(X: Tensor, real: Tensor | None) -> Tensor:
    squares = X.double().square().sum(-1)
    if real is None:
        return squares.sum((0, 2))
    return (squares * _per_head(real, X)).sum((0, 2))


def _number(X: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        return torch.full((X.shape[1],), float(X.shape[0] * X.shape[2]), dtype=torch.float64, device=X.device)
    return _per_head(real, X).expand(X.shape[:3]).double().sum((0, 2))


def _per_head(real: Tensor, X: Tensor) -> Tensor:
    """For the heads that X has, which may be fewer where several query heads share one."""
    heads = real.shape[1]
    return real if heads == 1 or heads == X.shape[1] else real[:, :: heads // X.shape[1]]
