"""Which remedies do not fit which of the patients, and a part of the sentence that says why."""

from __future__ import annotations

REFUSED: dict[tuple[str, str], str] = {
    **{
        ("deflate-attention", patient): "would let tokens of a causal model see later ones"
        for patient in ("gpt2", "llama_padded", "plain_softmax", "zoo_decoder")
    },
    ("qk-norm", "plain_softmax"): "shows no queries and keys",
    **{
        ("reduce-tokens", patient): "reads no images"
        for patient in [
            "gpt2",
            "llama_padded",
            "bert",
            "t5",
            "torch_encoder",
            "plain_softmax",
            "zoo_decoder",
            "zoo_post",
        ]
    },
    ("reduce-tokens?method=prune", "zoo_vision"): "needs a class token",
    ("polarise", "gpt2"): "has none that it knows",
    **{
        (remedy, patient): "no norm before a branch" if remedy == "layernorm-scaling" else "stand otherwise"
        for remedy in ("layernorm-scaling", "peri-norm")
        for patient in ("bert", "torch_encoder", "zoo_post")
    },
    **{
        ("deepnorm", patient): "stand otherwise"
        for patient in ("gpt2", "llama_padded", "t5", "vit", "plain_softmax", "zoo_decoder", "zoo_vision")
    },
    **{("qkv-norm", patient): "no norm before a branch" for patient in ("bert", "torch_encoder", "zoo_post")},
    ("qkv-norm", "plain_softmax"): "shows no queries and keys",
    **{
        ("registers", patient): "reads no images"
        for patient in (
            "gpt2",
            "llama_padded",
            "bert",
            "t5",
            "torch_encoder",
            "plain_softmax",
            "zoo_decoder",
            "zoo_post",
        )
    },
    **{
        ("holistic-norm", patient): "look ahead"
        for patient in ("gpt2", "llama_padded", "t5", "plain_softmax", "zoo_decoder")
    },
    **{("holistic-norm", patient): "stand otherwise" for patient in ("bert", "torch_encoder", "zoo_post")},
}
"""(remedy, patient) → words of the reason. Everything that is not here must work."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "center-attention": ("center-attention?gain=energy", "center-attention?gain=values&factor=0.5&learn=true"),
    "gain-control": ("gain-control?gain=energy&learn=true",),
    "deflate-attention": ("deflate-attention?k=2&strength=0.5",),
    "differential": ("differential?norm=head&start=0.5&strength=0.3",),
    "shaped": ("shaped?start=skipless", "shaped?start=value-skipinit"),
    "temperature": (
        "temperature?kind=log-context",
        "temperature?kind=root-log-context&scale=0.7&learnable=false",
        "temperature?kind=entropy",
        "temperature?kind=balance&learnable=false",
    ),
    "qk-norm": ("qk-norm?norm=l2&start=usual",),
    "learned-sink": ("learned-sink?start=0",),
    "qk-clip": ("qk-clip?threshold=0.3",),
    "entropy-regulariser": ("entropy-regulariser?learnable=true&margin=0.05&rows=5",),
    "rank-regulariser": ("rank-regulariser?layers=all",),
    "local-mask": ("local-mask?window=3&side=past&first=1",),
    "hopfield": ("hopfield?average=0.3&start=first&skip=0.6", "hopfield?keep=2"),
    "residual-scores": ("residual-scores?kind=mean&tolerance=0.4",),
    "value-residual": ("value-residual?kind=fixed", "value-residual?first=0.3&own=0.8"),
    "position-gate": ("position-gate?kind=element-wise&bias=false", "position-gate?phi=sigmoid"),
    "reduce-tokens": (
        "reduce-tokens?method=merge",
        "reduce-tokens?method=prune",
        "reduce-tokens?update=plain&windows=[3,2,1]&keep=0.3&compensate=false&restore=true",
        "reduce-tokens?method=merge&r=3&layers=[1,3]&compensate=false",
    ),
    "scaled-init": ("scaled-init?by=depth",),
    "deepscale-init": ("deepscale-init?residual=false&how=draw&tokens=16",),
    "t-fixup": ("t-fixup?norms=remove",),
    "orthogonal-init": ("orthogonal-init?by=head",),
    "sigma-reparam": ("sigma-reparam?per=role&roles=attention",),
    "value-output-sign": ("value-output-sign?method=nearest&sign=positive",),
    "bn-orthogonalise": ("bn-orthogonalise?roles=mlp&power=1",),
    "polarise": ("polarise?ones=0&zeros=2",),
    "residual-scale": ("residual-scale?by=depth&alpha=0.5&mlp=0.3&skip=variance",),
    "rezero": ("rezero?start=0.5&norms=keep",),
    "skip-init": ("skip-init?start=0.2&norms=remove",),
    "layer-scale": ("layer-scale?start=none",),
    "lambda-skip": ("lambda-skip?strength=-1&at=all&learnable=true",),
    "deepnorm": ("deepnorm?alpha=2&weights=false",),
    "peri-norm": ("peri-norm?kind=rms&start=0.5",),
    "contranorm": ("contranorm?scale=0.7",),
    "registers": ("registers?number=1&std=1&seed=3",),
    "batch-norm": ("batch-norm?momentum=1&final=false",),
    "holistic-norm": ("holistic-norm?final=false",),
}
"""Remedy → further settings that go through the same contract, such as `temperature?kind=log-context`."""

QUIET = frozenset({"qk-clip"})
"""Settings at which nothing is changed on the patients, as they are told to."""
