"""Every threshold of every verdict, with its reason: there are no others in this room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["THRESHOLDS", "Threshold", "effect_limits", "threshold"]


@dataclass(frozen=True)
class Threshold:
    """A limit beyond which a number is held against a model.

    Attributes:
        name: `dead-depth.update_share`: the failure, then what is limited.
        value: the limit.
        unit: of the number, in words.
        reason: where the limit comes from.
    """

    name: str
    value: float
    unit: str
    reason: str


def threshold(name: str) -> float:
    """The value of a threshold."""
    return THRESHOLDS[name].value


def effect_limits() -> tuple[tuple[str, float], ...]:
    """What counts as an effect of an intervention, by outcome."""
    return tuple((name, THRESHOLDS[f"effect.{name}"].value) for name in ("loss", "distribution", "state"))


_ALL: Final = (
    Threshold(
        "sure.level",
        0.95,
        "of Student's distribution",
        "a number counts as above or below a limit where its 95 % interval is, which for a few documents is wider than "
        "two standard errors: of healthy numbers that touch the limit one in forty is beyond it by chance",
    ),
    Threshold(
        "effect.loss",
        0.01,
        "of loss",
        "a hundredth of a nat, of a cross-entropy, is within the noise of the last steps of a run",
    ),
    Threshold(
        "effect.share",
        0.1,
        "of the loss",
        "losses have any unit: a tenth of a mean squared error, or of a small cross-entropy, is an effect too",
    ),
    Threshold(
        "effect.least",
        0.001,
        "of loss",
        "a loss below it is fitted to the last digit, and what changes it by a share says nothing",
    ),
    Threshold("effect.distribution", 0.01, "nats of KL", "the same, of the output distribution"),
    Threshold(
        "effect.state",
        0.01,
        "share of the final state's variance",
        "a hundredth of the variance over tokens and documents: a probe on the state would lose as little",
    ),
    Threshold(
        "dead-depth.update_share",
        0.05,
        "share of the stream's size",
        "a few percent: every block of the pretrained encoder writes 49 % and more, of a small GPT-2 after 400 steps "
        "27 %; narrow models at initialisation write 1 %, which is why trained weights alone are held to it; the "
        "number is a note, the verdict is the intervention's",
    ),
    Threshold(
        "dead-depth.blocks",
        1 / 3,
        "share of the stack's blocks",
        "with a third of its blocks free to skip, a model is another, shallower one",
    ),
    Threshold(
        "rank-collapse-depth.token_energy",
        0.01,
        "share of the stream's energy",
        "cosine .99 between tokens of equal size; a shared bias alone does not count: see the cosine of standardised "
        "features",
    ),
    Threshold(
        "rank-collapse-depth.token_energy_alone",
        1e-3,
        "share of the stream's energy",
        "cosine .999, whoever shares the rest: gradients of queries and keys fall as (1 − ρ)² (noci), here to 1e-6; a "
        "post-norm model of ρ .995 still trains at small learning rates, one of ρ 1.000 not on a task of tokens",
    ),
    Threshold(
        "rank-collapse-depth.fall",
        0.1,
        "of the share before the first block, and of the initialisation's",
        "a tenth: what the input or the architecture has at its initialisation is no collapse in depth",
    ),
    Threshold(
        "rank-collapse-depth.similarity_standardized",
        0.5,
        "mean cosine of standardised features",
        "half of what is left without shared bias and rogue dimensions belongs to the sequence; the pretrained encoder "
        "ends at .15 to .24",
    ),
    Threshold(
        "rank-collapse-depth.channel_entropy",
        0.5,
        "of 1",
        "below it a few channels hold nearly all energy, and their share says nothing on the other ones",
    ),
    Threshold(
        "rank-collapse-depth.worth",
        0.05,
        "of loss, nats of KL, share of the final state's variance",
        "what is left of the tokens may be worth a little: where their differences were shrunk to 1 % in small trained "
        "decoders, replacing them by means costs .019 to .022 nats; in the same models before that .85 to 1.5, and in "
        "encoders of digits .37 or more",
    ),
    Threshold(
        "rank-collapse-depth.effective_rank",
        1.5,
        "directions",
        "one direction and rounding; two equal ones are 2, and healthy streams have many",
    ),
    Threshold(
        "rank-collapse-depth.effective_rank.given",
        3.0,
        "directions",
        "before the first block, and at initialisation: twice as many as count for one; with few tokens there are few "
        "directions from the start",
    ),
    Threshold(
        "rank-collapse-depth.dimensions",
        2.0,
        "dimensions by neighbours' distances",
        "a line has 1 and a plane 2; tokens of effective rank below 1.5 that lie on a line have 1.0 to 1.5, those "
        "among which one is ten thousand times as large keep the 25 to 35 that they have without it",
    ),
    Threshold(
        "vanishing-or-exploding.total",
        1e3,
        "times, beyond the reference",
        "pretrained decoders grow a hundredfold over depth and work; a stream that grows a thousandfold beyond its "
        "initialisation hides what later blocks write",
    ),
    Threshold(
        "vanishing-or-exploding.grave",
        1e6,
        "times, beyond the reference",
        "what float32 resolves beside 1 is 1e-7: what early or late blocks say is then lost in the other's rounding",
    ),
    Threshold(
        "numerics.distinct_at_dtype",
        0.01,
        "of the pairs of tokens that differed at an earlier layer, lost",
        "one pair in a hundred: more than repeated words at the same place of two lists; healthy models lose none",
    ),
    Threshold(
        "numerics.distinct_at_dtype.grave",
        0.5,
        "of the pairs of tokens that differed at an earlier layer, lost",
        "most tokens that differed are one number",
    ),
    Threshold(
        "numerics.margin",
        4.0,
        "times the largest entry",
        "two doublings: another batch, or the inside of a block, is easily four times what is seen in the stream",
    ),
    Threshold(
        "numerics.over",
        2.0,
        "times the largest number of a dtype that was asked about",
        "one doubling: what is just over may fit with another batch, or with rounding in between; twice as much gives "
        "infinities",
    ),
    Threshold(
        "freshness.deviation",
        6.0,
        "standard errors",
        "of hundreds of tensors none is expected so far off by chance; twenty steps of training are tens to hundreds",
    ),
    Threshold(
        "freshness.share",
        0.1,
        "of a model's tensors",
        "training moves nearly all that take part; an edit or a start of somebody's own moves a few",
    ),
    Threshold(
        "freshness.fewest",
        64,
        "numbers of a tensor",
        "of fewer the spread is known to a tenth at best, and says nothing beside another draw's",
    ),
    Threshold(
        "freshness.heavy",
        1.0,
        "excess kurtosis at initialisation",
        "a draw with such tails estimates its own kurtosis too badly for a standard error of √(24/n)",
    ),
    Threshold(
        "freshness.least_spread",
        0.1,
        "of k + 2, k the excess kurtosis",
        "entries that are all of one size (±a) have k = −2, and a spread that would be known without error; those of "
        "the uniform distribution have .8",
    ),
    Threshold(
        "freshness.loaded",
        0.5,
        "of the numbers that are not constant",
        "a constructor that gives most weights the same values whatever the seed loads them, and draws none",
    ),
    Threshold(
        "rank-collapse-width.random",
        -0.5,
        "exponent of the context",
        "the random-matrix law: attention with independent logits passes on differences like 1/√T, full or causal",
    ),
    Threshold(
        "rank-collapse-width.share",
        0.5,
        "share of the exponent at initialisation, or of random attention's",
        "half way to heads that keep choosing their keys (0); the pretrained encoder's layers lie between −0.08 and "
        "+0.05, its initialisation's between −0.28 and −0.26",
    ),
    Threshold(
        "rank-collapse-width.least",
        -0.25,
        "exponent of the context at initialisation",
        "beyond the width of the model fresh attention hardly falls any more: it is held to fall this much at least",
    ),
    Threshold(
        "rank-collapse-width.gain",
        0.25,
        "differences that come out over those that go in, at the longest context",
        "a quarter of the amplitude, a sixteenth of the energy, beside a mean that comes through whole",
    ),
    Threshold(
        "rank-collapse-width.layers",
        0.5,
        "share of the layers",
        "single layers that average are found in healthy models; half of a stack is not the work of one layer",
    ),
    Threshold(
        "rank-collapse-width.fresh",
        1.5,
        "times the exponent of random attention",
        "what is fresh falls like random attention; half as fast again is more than finite contexts make of it",
    ),
    Threshold(
        "rank-collapse-width.rounding",
        1e-5,
        "differences that come out over those that go in",
        "products in float32 err by 1e-7 of the values, whose mean may be a hundred times their differences",
    ),
    Threshold(
        "context-dilution.random",
        1.0,
        "exponent of the context",
        "logits whose spread does not depend on the context: effective keys are a fixed share of all keys",
    ),
    Threshold(
        "context-dilution.exponent",
        0.9,
        "exponent of the context, of the slowest head",
        "ten times the context makes eight times the effective keys: hardly a key that is added is left out",
    ),
    Threshold(
        "context-dilution.loss",
        0.01,
        "nats per doubling of the context",
        "a hundredth of a nat is within the noise of the last steps of a run; a loss that falls by more makes use of "
        "what is added",
    ),
    Threshold(
        "context-dilution.layers",
        0.5,
        "share of the layers",
        "single layers that average are found in healthy models; half of a stack is not the work of one layer",
    ),
    Threshold(
        "kinds.spread",
        0.9,
        "of the largest entropy",
        "rows that spread over most keys: 0.9 log n is as many keys as n^0.9",
    ),
    Threshold(
        "kinds.selective",
        0.05,
        "nats",
        "attention weights of a row differ from the average row's by about a third of their size, √(2·0.05): a "
        "mean that is taken once for all queries is right to a third",
    ),
    Threshold(
        "kinds.particular",
        0.3,
        "of log n − H",
        "less than a third of what makes the rows sharp belongs to the query; a sink of entropy .15 log n has .1 "
        "to .2, a pointer .9",
    ),
    Threshold(
        "kinds.sink",
        0.5,
        "of a head's attention",
        "most of it",
    ),
    Threshold(
        "kinds.few",
        0.3,
        "of the largest entropy",
        "0.3 log n is n^0.3 keys: three or four of sixty-four",
    ),
    Threshold(
        "kinds.many",
        0.5,
        "of the largest entropy",
        "√n keys: eight of sixty-four; the same average for every query, no matter how weighted",
    ),
    Threshold(
        "kinds.known",
        0.02,
        "of the largest entropy",
        "below it the number of keys is not read off entropies, which are 0 over 0",
    ),
    Threshold(
        "kinds.of_the_mask",
        0.052,
        "nats",
        "plain causal averages, 1/t each over t keys, differ by that much from their own average over t in (T/2, T]: "
        "the first half of the keys is in all of them, later ones in fewer; .048 for T = 16, .0521 for long contexts",
    ),
    Threshold(
        "averaging-heads.share",
        0.5,
        "of a layer's heads",
        "most of them",
    ),
    Threshold(
        "averaging-heads.layers",
        2,
        "layers",
        "several: a single layer that averages is a design",
    ),
    Threshold(
        "averaging-heads.depth",
        0.25,
        "of the stack's layers",
        "one layer that pools is a design; a quarter of the depth is capacity lost",
    ),
    Threshold(
        "entropy-collapse.entropy",
        0.05,
        "of the largest entropy",
        "n^0.05 keys: one, of whatever context",
    ),
    Threshold(
        "entropy-collapse.pointer",
        0.93,
        "of log n − H",
        "every key is some query's own; queries that choose at random among 64 keys reach .89, log n less the .45 nats "
        "by which some keys are chosen twice and others never",
    ),
    Threshold(
        "entropy-collapse.logit_std",
        30,
        "logits",
        "the largest of 64 Gaussian logits of that size is some 70 above the mean, near where QK-Clip acts "
        "(oversmoothing_fixes), and sixteen keys are left with an entropy of .05; the pretrained encoder's heads have "
        ".6 to 5, its pointer to one token 20",
    ),
    Threshold(
        "entropy-collapse.whatever",
        100,
        "logits",
        "for pointers and heads that rest on the first token as well: the one key leads by 400 of sixteen and by 800 "
        "of sixty-four, which no step of training takes back; a healthy pointer leads by ten to a few tens",
    ),
    Threshold(
        "entropy-collapse.rise",
        10,
        "times the initialisation",
        "default initialisations have logits of .1 to 1; training raises them a few times",
    ),
    Threshold(
        "entropy-collapse.gradient",
        1e-5,
        "of queries' over values' gradient at initialisation",
        "strong pointers and sinks, which are healthy, let 1e-4 to 1e-2 through; this is near float32's rounding",
    ),
    Threshold(
        "entropy-collapse.usual_gradient",
        0.05,
        "of values' gradient",
        "for fresh weights: default initialisations give .02 to .2 (noci)",
    ),
    Threshold(
        "entropy-collapse.resting",
        2,
        "heads of the stack that are not frozen",
        "a key on which they rest is a sink, such as a delimiter; one head alone may meet a frozen one by chance",
    ),
    Threshold(
        "entropy-collapse.share",
        0.5,
        "of a layer's heads",
        "half of a layer",
    ),
    Threshold(
        "sinks.mass",
        0.3,
        "of a head's attention",
        "the threshold of Gu et al. (2410.10781)",
    ),
    Threshold(
        "sinks.over_uniform",
        3,
        "times 1/n",
        "in short sequences a plain average gives every key a good share",
    ),
    Threshold(
        "sinks.few",
        0.05,
        "of a stack's heads",
        "fewer rest on the first token than would matter to the loss",
    ),
    Threshold(
        "sinks.over_initialisation",
        2,
        "times the same head's mass at initialisation",
        "fresh heads are near uniform, and over_uniform holds for them nearly always; twice as much was learned",
    ),
    Threshold(
        "sinks.massive",
        1000,
        "times the median",
        "the rule of thumb for massive activations (oversmoothing_fixes)",
    ),
    Threshold(
        "redundant-heads.similarity",
        0.98,
        "cosine",
        "one of the two can be dropped with at most a fifth of what it writes lost, √(1 − .98²)",
    ),
    Threshold(
        "redundant-heads.initialisation",
        0.9,
        "cosine",
        "heads that are alike at initialisation are alike by their architecture",
    ),
    Threshold(
        "query-key-starvation.elasticity_ratio",
        0.05,
        "times the initialisation, or an earlier layer of a fresh model",
        "a twentieth: (1 − ρ)² for tokens of cosine .78 where they were apart; sampling moves it by tens of percent",
    ),
    Threshold(
        "query-key-starvation.resolved",
        1e-6,
        "ratio of elasticities",
        "float32's rounding: below it even a healthy ratio cannot be told from 0, and nothing is compared with it",
    ),
    Threshold(
        "query-key-starvation.epsilon",
        1,
        "times epsilon",
        "Adam's step is half of what it would be where the gradient's entries are epsilon",
    ),
    Threshold(
        "query-key-starvation.unmoved",
        0.1,
        "relative change",
        "largest singular values of two draws of 64 × 64 differ by up to 8 %, those of larger ones by less",
    ),
    Threshold(
        "query-key-starvation.moved",
        0.3,
        "relative change",
        "far more than two draws differ by: these weights were trained",
    ),
)

THRESHOLDS: Final[dict[str, Threshold]] = {one.name: one for one in _ALL}
