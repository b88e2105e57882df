"""The weights of the kinds of models, by role, as matrices (out, in): by their names, without the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = ("gpt2", "llama", "bert", "t5", "vit", "torch_encoder", "plain")


def matrices(name: str, model: Any) -> dict[tuple[str, int, str], Tensor]:
    """(stack, layer, role) → (out, in), copied; cross-attention as `cross.q` and so on."""
    found: dict[tuple[str, int, str], Tensor] = {}

    def note(stack: str, layer: int, **weights: Tensor) -> None:
        found.update({(stack, layer, role): W.detach().clone() for role, W in weights.items()})

    if name == "t5":
        for stack in ("encoder", "decoder"):
            for i, block in enumerate(getattr(model, stack).block, 1):
                a, m = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
                own = {"q": a.q, "k": a.k, "v": a.v, "o": a.o, "up": m.wi, "down": m.wo}
                note(stack, i, **{role: linear.weight for role, linear in own.items()})
                if stack == "decoder":
                    c = block.layer[1].EncDecAttention
                    note(stack, i, **{f"cross.{r}": getattr(c, r).weight for r in "qkvo"})
        return found
    stack = {"bert": "encoder", "torch_encoder": "encoder", "vit": "vision"}.get(name, "decoder")
    blocks = model.encoder.layer if name == "bert" else model.h if name in ("gpt2", "plain") else model.layers
    for i, b in enumerate(blocks, 1):
        match name:
            case "gpt2":
                q, k, v = b.attn.c_attn.weight.T.chunk(3)
                note(stack, i, q=q, k=k, v=v, o=b.attn.c_proj.weight.T)
                note(stack, i, up=b.mlp.c_fc.weight.T, down=b.mlp.c_proj.weight.T)
            case "plain":
                q, k, v = b.attn.c_attn.weight.chunk(3)
                note(stack, i, q=q, k=k, v=v, o=b.attn.c_proj.weight, up=b.mlp[0].weight, down=b.mlp[2].weight)
            case "torch_encoder":
                q, k, v = b.self_attn.in_proj_weight.chunk(3)
                note(stack, i, q=q, k=k, v=v, o=b.self_attn.out_proj.weight)
                note(stack, i, up=b.linear1.weight, down=b.linear2.weight)
            case "llama" | "vit":
                a = b.self_attn if name == "llama" else b.attention
                note(stack, i, q=a.q_proj.weight, k=a.k_proj.weight, v=a.v_proj.weight, o=a.o_proj.weight)
                if name == "llama":
                    note(stack, i, up=b.mlp.up_proj.weight, gate=b.mlp.gate_proj.weight, down=b.mlp.down_proj.weight)
                else:
                    note(stack, i, up=b.mlp.fc1.weight, down=b.mlp.fc2.weight)
            case "bert":
                a = b.attention.self
                note(stack, i, q=a.query.weight, k=a.key.weight, v=a.value.weight)
                note(stack, i, o=b.attention.output.dense.weight)
                note(stack, i, up=b.intermediate.dense.weight, down=b.output.dense.weight)
    return found


def others(model: Any, roles: dict[tuple[str, int, str], Tensor]) -> dict[str, Tensor]:
    """Parameters that hold none of the roles: norms, biases, embeddings."""
    held = {tuple(W.flatten()[:3].tolist()) for W in roles.values()}
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.ndim != 2 or not held & {tuple(p.flatten()[:3].tolist()), tuple(p.T.flatten()[:3].tolist())}
    }


def rms(W: Tensor) -> float:
    """Root mean square of the entries."""
    return float(W.square().mean().sqrt())


def erank(W: Tensor) -> float:
    """Exp of the entropy of the singular values over their sum."""
    s = torch.linalg.svdvals(W)
    p = s / s.sum()
    return float((-(p * p.log()).sum()).exp())
