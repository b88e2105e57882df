"""A small selective state-space model: every channel of every token remembers by a factor of its own.

From top to bottom: the model, its block, the state space, the decay of its channels, the scan. What of a
channel survives a token is said by one module, `Decay`, and by nothing else: to change it, change what that returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.errors import ModelError
from fullrank.zoo.branch import Branch, scaled
from fullrank.zoo.inputs import require_fitting_mask, the_one_given, token_vectors_or_ids
from fullrank.zoo.norms import norm_of
from fullrank.zoo.options import choice, number, switch, whole
from fullrank.zoo.output import Prediction, loss_of
from fullrank.zoo.weights import draw, draw_linear

__all__ = ["Block", "Decay", "StateSpace", "StateSpaceConfig", "StateSpaceMixer", "scan"]

Norm = Literal["layernorm", "rmsnorm", "none"]
Placement = Literal["pre", "post", "none"]
Write = Literal["convex", "step"]


@dataclass(frozen=True, kw_only=True)
class StateSpaceConfig:
    r"""What a `StateSpace` is made of.

    With $\lambda$ the skip and $N$ the norm, a block is by `placement` $X \leftarrow \lambda X + f(NX)$ (`pre`),
    $N(\lambda X + f(X))$ (`post`) or $\lambda X + f(X)$ (`none`).

    Attributes:
        depth: blocks.
        width: of the stream.
        states: channels of the memory of each feature.
        write: what a token writes is $(1 - \bar A_t)B_t x_t$ (`convex`), or $\Delta_t B_t x_t$ (`step`).
        selective: whether steps, and with them decays, depend on the token.
        steps: least and largest step Δ at the start, log-uniform between features; channel n decays by $e^{-n\Delta}$.
        gate: whether what is read is multiplied by $\mathrm{silu}(W_{gate}x)$.
        norm: which.
        placement: where it stands.
        final_norm: whether the head reads a norm; by default after `pre`.
        skip_scale: λ.
        vocabulary: number of token ids.
        embedding_std: standard deviation of the entries of the embedding.
    """

    depth: int = 4
    width: int = 64
    states: int = 8
    write: Write = "step"
    selective: bool = True
    steps: tuple[float, float] = (0.001, 0.1)
    gate: bool = True
    norm: Norm = "rmsnorm"
    placement: Placement = "pre"
    final_norm: bool | None = None
    skip_scale: float = 1.0
    vocabulary: int = 256
    embedding_std: float = 1.0

    def __post_init__(self) -> None:
        for name, options in (("write", Write), ("norm", Norm), ("placement", Placement)):
            choice(name, getattr(self, name), get_args(options))
        if self.final_norm is None:
            object.__setattr__(self, "final_norm", self.placement == "pre" and self.norm != "none")
        for name, least in (("depth", 1), ("width", 1), ("states", 1), ("vocabulary", 2)):
            whole(name, getattr(self, name), least)
        for name in ("selective", "gate", "final_norm"):
            switch(name, getattr(self, name))
        number("skip_scale", self.skip_scale)
        number("embedding_std", self.embedding_std, 0.0)
        if not isinstance(self.steps, tuple) or len(self.steps) != 2 or not 0 < self.steps[0] <= self.steps[1] < 10:
            raise ModelError(f"steps={self.steps!r} must be two rising numbers above 0 and below 10.")
        if self.norm == "none" and (self.placement != "none" or self.final_norm):
            raise ModelError(
                f"norm='none' leaves nothing for placement={self.placement!r} or final_norm={self.final_norm}."
            )


class StateSpace(nn.Module):
    """Embedding, `config.depth` blocks, a final norm, a head; causal, without positions.

    Args:
        config: its options.
        seed: of the weights, which are drawn without touching anybody's random numbers.
    """

    def __init__(self, config: StateSpaceConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        config = StateSpaceConfig() if config is None else config
        self.config = config
        self.main_input_name = "input_ids"
        device = torch.get_default_device()
        with torch.device("meta"):  # where constructors of torch draw nothing
            self.embedding = nn.Embedding(config.vocabulary, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.final_norm = norm_of(config.norm, config.width) if config.final_norm else None
            self.head = nn.Linear(config.width, config.vocabulary)
        self.to_empty(device=device)
        self.reset_parameters(torch.Generator().manual_seed(seed))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew; gains become 1 and biases, but those of the steps, 0.

        Args:
            generator: on the CPU; by default torch's own, as for every module of torch.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
        draw(self.embedding.weight, self.config.embedding_std, generator)
        for block in self.blocks:
            for part in block.modules():
                if isinstance(part, StateSpaceMixer):
                    part.reset_parameters(generator)
        draw_linear(self.head, 1.0, None, generator)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Prediction:
        """Logits of every token.

        Args:
            input_ids: (sequences, tokens) of ids.
            attention_mask: (sequences, tokens), 1 for real tokens; padding writes nothing.
            labels: (sequences, tokens), the tokens themselves, with -100 for those that are left out.
            inputs_embeds: (sequences, tokens, width) in place of `input_ids`.

        Returns:
            Logits, and with labels the loss of telling every token from those before it.
        """
        given = the_one_given(input_ids=input_ids, inputs_embeds=inputs_embeds)
        x = next(one for one in (input_ids, inputs_embeds) if one is not None)
        token_vectors_or_ids(x, given, self.config.width, None)
        X = self.embedding(x) if given == "input_ids" else x
        require_fitting_mask(attention_mask, *X.shape[:2])
        for block in self.blocks:
            X = block(X, attention_mask)
        logits = self.head(X if self.final_norm is None else self.final_norm(X))
        return Prediction(logits, loss_of(logits, labels, shifted=True))


class Block(nn.Module):
    """A state space that is added to the stream (see `StateSpaceConfig`).

    Args:
        config: of the model.
    """

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__()
        self.config = config
        before = norm_of(config.norm, config.width) if config.placement == "pre" else None
        self.mixer = Branch(StateSpaceMixer(config), before=before)
        self.after = norm_of(config.norm, config.width) if config.placement == "post" else None

    def forward(self, X: Tensor, real: Tensor | None = None) -> Tensor:
        """(sequences, tokens, width) after the block; `real` is 1 for tokens that are no padding."""
        X = scaled(self.config.skip_scale, X) + self.mixer(X, real)
        return X if self.after is None else self.after(X)


class StateSpaceMixer(nn.Module):
    r"""Memory of every feature in `states` channels: $h_t = \bar A_t h_{t-1} + w_t$, read as $y_t = C_t \cdot h_t$.

    $u = W_{in}x$, $\Delta = \mathrm{softplus}(W_\Delta u + b_\Delta)$, $B = W_Bu$ and $C = W_Cu$ of each token; what it
    writes, $w_t$, is $\Delta_t B_t u_t$, or $(1 - \bar A_t)B_t u_t$, which is nothing in a channel that keeps all.

    Args:
        config: of the model.
    """

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__()
        self.config = config
        width, states = config.width, config.states
        self.input = nn.Linear(width, width, bias=False)
        self.step = nn.Linear(width, width)
        self.write = nn.Linear(width, states, bias=False)
        self.read = nn.Linear(width, states, bias=False)
        self.gate = nn.Linear(width, width, bias=False) if config.gate else None
        self.output = nn.Linear(width, width, bias=False)
        self.decay = Decay(width, states)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew; steps without their token are spread log-uniformly over the features."""
        for linear in (self.input, self.write, self.read, self.gate, self.output):
            if linear is not None:
                draw_linear(linear, 1.0, None, generator)
        draw_linear(self.step, 0.1 if self.config.selective else 0.0, None, generator)
        low, high = map(math.log, self.config.steps)
        steps = torch.linspace(low, high, self.config.width, dtype=torch.float64).exp()
        self.step.bias.copy_(steps.expm1().log())  # what softplus turns into them
        self.decay.reset_parameters()

    def forward(self, X: Tensor, real: Tensor | None = None) -> Tensor:
        """What the state space adds to the stream.

        Args:
            X: (sequences, tokens, width).
            real: (sequences, tokens), 1 for tokens that are no padding; None for all.

        Returns:
            (sequences, tokens, width).
        """
        u = self.input(X)  # (B, T, d)
        steps = functional.softplus(self.step(u) if self.config.selective else self.step.bias.expand_as(u))
        A_bar = self.decay(steps)  # (B, T, d, N)
        strength = steps[..., None] if self.config.write == "step" else 1 - A_bar
        written = strength * (u[..., None] * self.write(u)[..., None, :])
        if real is not None:
            written = written * real.to(written.dtype)[..., None, None]
        h = scan(A_bar, written)
        y = (h * self.read(u)[..., None, :]).sum(-1)
        out: Tensor = self.output(y if self.gate is None else y * functional.silu(self.gate(X)))
        return out


class Decay(nn.Module):
    r"""What of every channel survives a token: $\bar A = \exp(-\Delta\,e^{a})$, between 0 (forgets) and 1 (keeps).

    Args:
        width: features.
        states: channels of each.
    """

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.empty(width, states))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let channel n decay at rate n, from 1 on."""
        rates = torch.arange(1, self.log_rate.shape[1] + 1, dtype=torch.float64)
        self.log_rate.copy_(rates.log().expand_as(self.log_rate))

    def forward(self, steps: Tensor) -> Tensor:
        """(sequences, tokens, width) of steps Δ to (sequences, tokens, width, states) of factors in [0, 1]."""
        return torch.exp(-steps[..., None] * self.log_rate.exp())


def scan(A: Tensor, w: Tensor) -> Tensor:
    r"""$h_t = A_t h_{t-1} + w_t$ from $h_0 = 0$, by doubling the span that every token knows.

    Spans compose as $(A', w') \circ (A, w) = (A'A, A'w + w')$: log₂ T steps of products and sums, in which nothing is
    divided, so that factors of 0 and 1 are exact.

    Args:
        A: (sequences, tokens, …).
        w: of the same shape.

    Returns:
        Every h, of the same shape.
    """
    span = 1
    while span < w.shape[1]:
        w = torch.cat([w[:, :span], w[:, span:] + A[:, span:] * w[:, :-span]], 1)
        A = torch.cat([A[:, :span], A[:, span:] * A[:, :-span]], 1)
        span *= 2
    return w
