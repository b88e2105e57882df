"""Temperature: attention scores multiplied, by head, by the number of visible keys, or to meet a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fullrank.edit import Call, Edit
from fullrank.errors import EditError
from fullrank.remedies.attention.calibrating import Calibrated, calibrate
from fullrank.remedies.attention.scores import scores, seen_in, visible_numbers
from fullrank.remedies.attention.unpadded import unpadded
from fullrank.remedies.parameter import Parameter
from fullrank.remedies.patient import Patient, Site
from fullrank.remedies.remedy import remedy

__all__ = ["Temperature", "balanced_temperature", "temperature", "temperature_for_entropy"]

_SAMPLE = 1 << 22  # scores per call on which a temperature is calibrated
_WIDEST = 1e3  # what calibration may multiply or divide by
_LAWS = {"log-context": torch.log, "root-log-context": lambda n: torch.log(n).sqrt()}


class Temperature(Calibrated):
    """s ← τ_h(n) s: on the queries where the kernel shows them, else on the visible scores.

    Args:
        heads: how many.
        start: τ, or what the law is multiplied by.
        kind: `fixed`, `log-context`, `root-log-context`, `entropy` or `balance`.
        learnable: whether it is a parameter.
        target: of the mean normalised entropy.
        most: the largest τ that balances gradients.
    """

    def __init__(self, heads: int, start: float, kind: str, *, learnable: bool, target: float, most: float) -> None:
        super().__init__(heads, start, learnable=learnable)
        self.kind, self.target, self.most = kind, target, most

    def measure(self, call: Call) -> Tensor:
        """τ for each head of this call.

        Returns:
            (heads,).

        Raises:
            EditError: where the call shows no input to balance on.
        """
        if self.kind == "entropy":
            rows = _some_queries(call)
            s, seen = scores(call, rows)
            added = None
            if call.bias is not None or (call.mask is not None and call.mask.dtype != torch.bool):
                product, _ = scores(call.change(bias=None, mask=None), rows)  # what the queries have a part in
                s, added = product, s - product
            real = unpadded(call)
            real = None if real is None else real[:, rows]
            return temperature_for_entropy(s, seen, self.target, added, real).to(self.per_head)
        if call.input is None:
            raise EditError(f"attention in {call.place.path} was given no stream; kind='balance' needs its tokens.")
        seen = seen_in(call)
        real = None if seen is None else seen.expand(*seen.shape[:-1], call.keys).any(dim=-2).any(dim=1)
        if real is not None and real.shape != call.input.shape[:2]:
            real = real.expand(call.input.shape[:2]) if real.shape[-1] == call.input.shape[1] else None
        return balanced_temperature(call.input, real).clamp(max=self.most).to(self.per_head).expand_as(self.per_head)

    def forward(self, call: Call) -> Call:
        """The call with its scores multiplied."""
        tau = self.present(call)[:, None, None]
        if self.kind in _LAWS:
            n = visible_numbers(call)
            tau = tau.to(n.dtype) * _LAWS[self.kind](n.clamp(min=1))
        if call.query is not None:
            return call.change(query=_times(call.query, tau))
        assert call.logits is not None
        seen = seen_in(call)
        assert seen is not None
        finite = torch.where(seen, call.logits, 0.0)  # −∞ times τ has no gradient with respect to τ
        return call.change(logits=torch.where(seen, _times(finite, tau), call.logits))


def temperature_for_entropy(
    s: Tensor, seen: Tensor | None, target: float, added: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """The inverse temperature at which each head's mean normalised entropy meets a target, by bisection.

    E_h(τ) = mean over sequences and queries of H(softmax(τ s + b))/log n, n the number of visible keys; padding and
    queries that see one key are left out. Without b it falls with τ; 44 halvings of log τ.

    Args:
        s: (batch, heads, queries, keys) scores.
        seen: which are visible; broadcasts to `s`; None for all.
        target: in (0, 1).
        added: b, what is added to the scores and not multiplied; None for 0.
        real: (batch, queries) bool, which are no padding; None for all.

    Returns:
        (heads,); 1 where no τ in [1/1000, 1000] meets it, as for a head whose scores are all the same.
    """
    seen = torch.ones_like(s, dtype=torch.bool) if seen is None else seen.expand(s.shape)
    n = seen.sum(-1)
    counted = (n > 1 if real is None else (n > 1) & real[:, None]).to(s.dtype)
    per_row = counted / n.clamp(min=2).to(s.dtype).log()
    rows = counted.sum((0, 2)).clamp(min=1)
    finite = torch.where(seen, s, 0.0)
    b = torch.zeros_like(s) if added is None else torch.where(seen, added, 0.0)

    def entropy(log_tau: Tensor) -> Tensor:
        tau = log_tau.exp()[:, None, None]
        x = (tau * finite + b).masked_fill(~seen, float("-inf"))
        x = torch.where(seen, x - x.amax(-1, keepdim=True), 0.0)
        e = torch.where(seen, torch.exp(x), 0.0)
        Z = e.sum(-1).clamp(min=1e-30)
        H = Z.log() - (e * x).sum(-1) / Z
        return (H * per_row).sum((0, 2)) / rows

    widest = torch.full(s.shape[1:2], math.log(_WIDEST), dtype=s.dtype, device=s.device)
    low, high = -widest, widest
    met = (entropy(low) >= target) & (entropy(high) <= target)
    for _ in range(44):
        middle = (low + high) / 2
        above = entropy(middle) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(met, ((low + high) / 2).exp(), 1.0)


def balanced_temperature(X: Tensor, real: Tensor | None = None) -> Tensor:
    """The temperature at which queries and values of a uniform attention layer have gradients of the same size.

    τ*² = d [1 + (T−1)ρ] / ((T+d)(1−ρ)²), ρ the mean cosine of two tokens of a sequence, T their number, for weights of
    variance 1/d and tokens of norm √d.

    Args:
        X: (batch, tokens, d), what the layer reads.
        real: (batch, tokens) bool, which are no padding; None for all.

    Returns:
        A scalar of at least √(d/(T+d)); very large where all tokens are alike.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    d = X.shape[-1]
    mask = torch.ones(X.shape[:2], dtype=X.dtype, device=X.device) if real is None else real.to(X.dtype)
    unit = torch.nn.functional.normalize(X, dim=-1) * mask[..., None]
    n = mask.sum(-1)
    pairs = (n * (n - 1)).clamp(min=0)
    rho = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))).sum() / pairs.sum().clamp(min=1)
    rho = rho.clamp(0, 1 - 1e-6)
    T = n.mean()
    return (d * (1 + (T - 1) * rho) / ((T + d) * (1 - rho).square())).sqrt()


def _some_queries(call: Call) -> Tensor:
    """Queries at even distances, few enough for their scores to be held."""
    rows = call.query if call.query is not None else call.logits
    assert rows is not None
    number = max(1, _SAMPLE // (rows.shape[0] * rows.shape[1] * call.keys))
    return torch.linspace(call.queries - 1, 0, min(number, call.queries), device=rows.device).round().long()


def _times(tensor: Tensor, tau: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * tau.to(wide)).to(tensor.dtype)


@remedy(
    "temperature",
    "attention scores multiplied: by head, by context length, to a target entropy, or to balance gradients",
    addresses=("averaging-heads", "entropy-collapse", "context-dilution", "query-key-starvation", "at-the-floor"),
    acts_on="attention",
    exactness="identity-now",
    formula=(
        "s ← τ_h s; fixed: τ = scale; log-context: τ = scale·log n, root-log-context: τ = scale·√log n, n = visible "
        "keys "
        "of the query; entropy: τ_h with mean H/log n = target; balance: τ² = d[1 + (T−1)ρ]/((T+d)(1−ρ)²)"
    ),
    papers=(
        "Chen, Lin, Polyanskiy, Rigollet, ICLR 2026, arXiv 2510.05554 (log n)",
        "Giorlandino, Goldt: Two failure modes of deep transformers and how to avoid them, ICLR 2026, arXiv 2505.24333 "
        "(√log n)",
        "Noci et al.: Signal Propagation in Transformers: Theoretical Perspectives and the Role of Rank Collapse, "
        "NeurIPS 2022, arXiv 2206.03126 (balance)",
        "Jha, Reagen: Entropy-Guided Attention, arXiv 2501.03489 (learnable temperature)",
    ),
    keys=("log_context", "giorlandino_goldt", "noci", "entropy"),
    parameters=(
        Parameter(
            "kind",
            "what sets τ",
            "fixed",
            kind="choice",
            choices=("fixed", "log-context", "root-log-context", "entropy", "balance"),
        ),
        Parameter(
            "scale",
            "τ of fixed (1 where none is given), or the factor of a log law (where none is given, such that τ = 1 at "
            "`length`)",
            None,
            above=0.0,
            high=1e3,
            optional=True,
        ),
        Parameter(
            "length",
            "number of keys at which a log law leaves scores as they are: those trained on; none for those of the "
            "batch",
            None,
            kind="integer",
            low=2,
            optional=True,
        ),
        Parameter("target", "mean H/log n that entropy is calibrated to", 0.7, above=0.0, high=0.99),
        Parameter("most", "the largest τ that balance may set", 10.0, low=1.0, high=_WIDEST),
        Parameter("learnable", "whether τ, or the factor of the law, is a parameter per head", True, kind="switch"),
    ),
    limits=(
        "As it stands by default it changes nothing until it is trained; the other kinds act at once.",
        "log n keeps the weight of keys that stand out by a fixed margin, √log n that of random scores: which of the "
        "two "
        "a head is nearer to is not measured here.",
        "Position biases are multiplied too where the model softmaxes by itself, and not where a kernel adds them.",
        "Of a model that softmaxes by itself with a sink and shifts each row of scores before, the shifted scores are "
        "multiplied and the sink is not.",
        "n comes from masks: sequences that a kernel is told to keep apart by lengths alone are counted as one.",
        "entropy is calibrated on this batch, on at most four million scores of a call; a module that is called "
        "several "
        "times, on its first call; a head that cannot meet the target keeps τ = 1.",
        "balance assumes weights of variance 1/d and full attention near uniform: causal attention is given the τ* of "
        "full attention over all tokens of a sequence. Where tokens are nearly alike it asks for a τ that makes "
        "attention one-hot, hence `most`.",
    ),
    cost="one product on the queries; fused kernels stay; one number per head",
)
def temperature(
    patient: Patient,
    *,
    kind: str = "fixed",
    scale: float | None = None,
    length: int | None = None,
    target: float = 0.7,
    most: float = 10.0,
    learnable: bool = True,
) -> Edit:
    """Multiply the scores of every self-attention."""

    def make(site: Site) -> Temperature:
        start = 1.0 if scale is None else scale
        if kind in _LAWS and scale is None:
            n = torch.tensor(float(max(2, max(call.keys for call in site.calls) if length is None else length)))
            start = 1 / float(_LAWS[kind](n.double()))
        one = Temperature(site.first.heads, start, kind, learnable=learnable, target=target, most=most)
        made.append(one)
        return one

    made: list[Temperature] = []
    edit = patient.rewrite("temperature", before=make)
    if kind in ("entropy", "balance"):
        with edit.kept():
            calibrate(patient, made)
    return edit
