"""How well theory foretells the similarity of tokens over depth, at initialisation, on many architectures.

python benchmarks/prediction.py                 # prints the table and writes it to benchmarks/prediction.md
python benchmarks/prediction.py --seeds 1 --dry # quicker, and writes nothing

The primary theory is named before anything is measured: by how well its assumptions hold. Beside it stands the
baseline that nothing changes with depth. skill = 1 − ΣMAE / ΣMAE(constant), over layers, models and seeds.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

from synthetic import Transformer
from timing import header

WIDTH, HEADS, TOKENS, DOCUMENTS = 128, 4, 96, 8
DEPTHS = (2, 12, 24)
FAMILIES = ("gpt2", "llama", "bert", "vit")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's name, and how to make it."""

    name: str
    make: object
    fan_in: bool


def config_of(family, depth, std):
    import transformers

    sizes = {"vocab_size": 997}
    match family:
        case "gpt2":
            sizes |= {"n_embd": WIDTH, "n_layer": depth, "n_head": HEADS, "n_positions": 128}
            return transformers.GPT2Config(**sizes, initializer_range=std)
        case "llama":
            sizes |= {"hidden_size": WIDTH, "num_hidden_layers": depth, "num_attention_heads": HEADS}
            sizes |= {"num_key_value_heads": HEADS // 2, "intermediate_size": 3 * WIDTH}
            return transformers.LlamaConfig(**sizes, initializer_range=std)
        case "bert":
            sizes |= {"hidden_size": WIDTH, "num_hidden_layers": depth, "num_attention_heads": HEADS}
            sizes |= {"intermediate_size": 4 * WIDTH, "max_position_embeddings": 128}
            return transformers.BertConfig(**sizes, initializer_range=std)
        case "vit":
            sizes = {"hidden_size": WIDTH, "num_hidden_layers": depth, "num_attention_heads": HEADS}
            sizes |= {"intermediate_size": 4 * WIDTH, "image_size": 40, "patch_size": 4}
            return transformers.ViTConfig(**sizes, initializer_range=std)
    raise AssertionError(family)


def of_family(family, depth, std):
    import transformers

    config = config_of(family, depth, std)
    return getattr(transformers, type(config).__name__.removesuffix("Config") + "Model")(config).eval()


def cases():
    found = []
    for family in FAMILIES:
        for depth in DEPTHS + ((48,) if family in ("gpt2", "bert") else ()):
            for name, std in (("default", 0.02), ("fan-in", WIDTH**-0.5)):
                if depth == 2 and name == "default":
                    continue
                label = f"{family}, {depth} blocks, {name}"
                found.append(Case(label, lambda f=family, d=depth, s=std: of_family(f, d, s), name == "fan-in"))
    for placement in ("pre", "post", "peri"):
        for branch in (0.3, 1.0, 2.0):
            for qk in (0.5, 1.0, 2.0):
                causal = (branch, qk) in ((1.0, 1.0), (0.3, 2.0), (2.0, 0.5))
                label = f"synthetic {placement}, 16 blocks, branch {branch:g}, q and k {qk:g}"
                sizes = {"depth": 16, "width": WIDTH, "heads": HEADS, "placement": placement, "branch": branch}
                sizes |= {"qk": qk, "causal": causal}
                found.append(Case(label + (", causal" if causal else ""), lambda s=sizes: Transformer(**s), True))
    return found


def batch_for(model, seed):
    import torch

    generator = torch.Generator().manual_seed(1000 + seed)
    if "ViT" in type(model).__name__:
        return {"pixel_values": torch.randn(DOCUMENTS, 3, 40, 40, generator=generator)}
    return {"input_ids": torch.randint(0, 997, (DOCUMENTS, TOKENS), generator=generator)}


def course(rows, source):
    """Layer → similarity of the stream at the headline scope."""
    from fullrank.table import headline

    own = [r for r in rows if (r.source, r.metric, r.site, r.part) == (source, "similarity", "stream", "out")]
    scope = headline({row.scope for row in own})
    return {row.layer: row.value for row in own if row.scope == scope and row.value is not None}


def compared(case, seed):
    """Mean absolute error of every theory that speaks, and of the constant; the primary; both ends of the course."""
    import torch

    import fullrank

    torch.manual_seed(seed)
    model = case.make()
    batch = batch_for(model, seed)
    architecture = fullrank.Architecture.from_model(model, batch)
    predicted = fullrank.predict(architecture)
    seen = course(fullrank.examine(model, batch, spectrum=False, reference=False).rows, "measured")
    layers = [layer for layer in seen if layer > 0]
    errors = {"constant": statistics.fmean(abs(seen[layer] - architecture.correlation) for layer in layers)}
    for standing in predicted.prediction.standings:
        told = course(predicted.rows, f"theory:{standing.key}")
        if told:
            errors[standing.key] = statistics.fmean(abs(seen[layer] - told[layer]) for layer in layers)
    return errors, predicted.prediction.primary, seen[0], seen[max(seen)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()

    began = time.perf_counter()
    chosen = [case for case in cases() if options.only in case.name]
    found = {}
    for case in chosen:
        found[case.name] = [compared(case, seed) for seed in range(options.seeds)]
        print(line(case.name, found[case.name]), flush=True)
    text = table(found, options.seeds, time.perf_counter() - began)
    print(text)
    if not options.dry:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


def means(runs):
    """Over seeds: error of the primary, of the constant, where the course begins and ends, who was primary."""
    own = statistics.fmean(errors[primary] for errors, primary, _, _ in runs)
    constant = statistics.fmean(errors["constant"] for errors, _, _, _ in runs)
    first, last = (statistics.fmean(run[index] for run in runs) for index in (2, 3))
    return own, constant, first, last, sorted({primary for _, primary, _, _ in runs})


def line(name, runs):
    own, constant, first, last, primaries = means(runs)
    skill = f"{1 - own / constant:.2f}" if constant > 0.05 else "–"
    return f"| {name} | {', '.join(primaries)} | {first:.3f} | {last:.3f} | {own:.3f} | {constant:.3f} | {skill} |"


def table(found, seeds, seconds):
    summary = {name: means(runs) for name, runs in found.items()}
    own, constant = (sum(one[index] for one in summary.values()) for index in (0, 1))
    moving = {name: one for name, one in summary.items() if one[1] > 0.05}
    worst = min(moving, key=lambda name: 1 - moving[name][0] / moving[name][1])
    farthest = max(summary, key=lambda name: summary[name][0])
    keys = sorted({key for runs in found.values() for errors, *_ in runs for key in errors} - {"constant"})
    pooled = []
    for key in keys:
        both = [(e[key], e["constant"]) for runs in found.values() for e, *_ in runs if key in e]
        pooled.append(
            f"| {key} | {len(both)} | {statistics.fmean(e for e, _ in both):.3f} | "
            f"{1 - sum(e for e, _ in both) / sum(c for _, c in both):.2f} |"
        )
    return "\n".join(
        [
            "# Theory against measurement, at initialisation",
            "",
            header(architectures=len(found), seeds=seeds, minutes=round(seconds / 60, 1)),
            "",
            f"`similarity` of the stream, every layer from 1 on, headline scope; width {WIDTH}, {DOCUMENTS} sequences "
            f"of about {TOKENS} tokens.",
            "Variances are measured from the weights and the first layer's similarity from the batch",
            "(`Architecture.from_model`); the primary theory is named before anything else is measured.",
            "The constant says that nothing changes with depth.",
            "",
            f"Pooled skill of the primary theory, 1 − ΣMAE/ΣMAE(constant): **{1 - own / constant:.3f}**; mean absolute "
            f"error **{own / len(summary):.3f}** (constant: {constant / len(summary):.3f}).",
            f"Of the {len(moving)} models whose constant errs by more than .05 the worst skill is "
            f"**{1 - moving[worst][0] / moving[worst][1]:.2f}** ({worst});",
            f"the largest error of all is {summary[farthest][0]:.3f} ({farthest}).",
            "",
            "| theory | runs | mean absolute error | skill |",
            "|---|---|---|---|",
            *pooled,
            "",
            "| model | primary | layer 0 | last layer | error | constant | skill |",
            "|---|---|---|---|---|---|---|",
            *(line(name, runs) for name, runs in found.items()),
            "",
        ]
    )


if __name__ == "__main__":
    main()
