"""Token reduction against loops over tokens, its costs against counted products, and the models that it fits."""

import copy

import pytest
import reduced_twin as twin
import timm_like
import torch
import transformers as hf
from remedy_patients import stir
from torch import nn

import fullrank
from fullrank.edit import Call, Place
from fullrank.errors import EditError, RemedyError
from fullrank.remedies import counted_macs, token_course, token_macs
from fullrank.remedies.tokens import token_places, token_scores
from fullrank.remedies.tokens.token_schedule import Reducing, equal_cost, quarters
from fullrank.remedies.tokens.token_scores import attention_of_class, attention_received
from fullrank.zoo import Transformer, TransformerConfig
from golden import assert_golden
from untouched import changes, everything

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
BATCH = {"pixel_values": IMAGES}


def vision(class_token=True, **options):
    config = {"depth": 3, "width": 32, "heads": 4, "mlp_width": 64, "image": 16, "patch": 4, "classes": 5}
    config |= {"class_token": class_token, "pooling": "first" if class_token else "mean"}
    model = Transformer(TransformerConfig(kind="vision", **config | options), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.double().eval()


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(
    ("parameters", "rule", "compensate"),
    [
        ({}, lambda p: twin.frequency({1: 2, 2: 1, 3: 1}, side=4, keep=0.7, sized=True), True),
        (
            {"update": "plain", "windows": (3, 2, 1), "keep": 0.3, "compensate": False},
            lambda p: twin.frequency({1: 3, 2: 2, 3: 1}, side=4, keep=0.3, sized=False),
            False,
        ),
        (
            {"windows": (2, 2), "keep": 0.2, "layers": (1, 3)},
            lambda p: twin.frequency({1: 2, 3: 2}, side=4, keep=0.2, sized=True),
            True,
        ),
        (
            {"keep": (0.9, 0.4), "windows": 1},
            lambda p: twin.frequency({1: 1, 2: 1, 3: 1}, side=4, keep={1: 0.9, 2: 0.4, 3: 0.4}, sized=True),
            True,
        ),
        ({"method": "merge", "r": (4, 1)}, lambda p: twin.merge({1: 4, 2: 1, 3: 1}, p), True),
        (
            {"method": "prune", "keep": (0.8, 0.5, 0.6)},
            lambda p: twin.prune((1, 2, 3), p, {1: 0.8, 2: 0.5, 3: 0.6}, "raw"),
            False,
        ),
        ({"method": "merge", "r": 3}, lambda p: twin.merge({1: 3, 2: 3, 3: 3}, p), True),
        (
            {"method": "merge", "r": 50, "layers": (2, 3), "compensate": False},
            lambda p: twin.merge({2: 50, 3: 50}, p),
            False,
        ),
        ({"method": "prune"}, lambda p: twin.prune((1, 2, 3), p, 0.7, "raw"), False),
        (
            {"method": "prune", "keep": 0.4, "fusion": "normalised", "compensate": True},
            lambda p: twin.prune((1, 2, 3), p, 0.4, "normalised"),
            True,
        ),
        ({"method": "prune", "fusion": "none", "layers": 2}, lambda p: twin.prune((2,), p, 0.7, "none"), False),
    ],
)
def test_logits_are_those_of_loops_over_tokens_heads_and_windows(class_token, parameters, rule, compensate):
    """With ω stirred; without a class token the head's mean weighs tokens by what they stand for."""
    if not class_token and parameters.get("method") == "prune":
        return
    model = vision(class_token)
    with fullrank.repair(model, "reduce-tokens", batch=BATCH, **parameters), torch.no_grad():
        added = {n: p for n, p in model.named_parameters() if "omega" in n}
        stir(added)
        weights = {
            layer: [added[f"blocks.{layer - 1}.attention.inner.fullrank_reduce_tokens_before.omega_{k}"] for k in kinds]
            for layer in (1, 2, 3)
            for kinds in [("high", "pooled")]
            if any(n.startswith(f"blocks.{layer - 1}.") for n in added)
        }
        found = model(**BATCH).logits
    with torch.no_grad():
        p = int(class_token)
        for image, logits in zip(IMAGES, found, strict=True):
            expected = twin.logits(model, image, rule(p), protected=p, omegas=weights, compensate=compensate)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def _call(T=20, *, logits=False, bias=False):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 8, generator=generator).double() for _ in range(3))
    more = torch.randn(2, 1, 1, T, generator=generator).double() if bias else None
    s = 0.5 * q @ k.mT + (0 if more is None else more)
    place = Place("vision", 1, "self", "")
    if logits:
        return Call(place, "softmax", v, logits=s, weights=s.softmax(-1)), s.softmax(-1)
    return Call(place, "sdpa", v, q, k, bias=more, scale=0.5), s.softmax(-1)


@pytest.mark.parametrize("options", [{}, {"logits": True}, {"bias": True}])
def test_scores_are_those_of_the_map_however_many_queries_are_read_at_a_time(options, monkeypatch):
    call, A = _call(**options)
    for numbers in (1 << 23, 700):
        monkeypatch.setattr(token_scores, "_NUMBERS", numbers)
        score = attention_received(call)
        torch.testing.assert_close(score, (A - 1 / 20).sum((1, 2)) / (3 * 20), rtol=0, atol=1e-14)
    torch.testing.assert_close(attention_of_class(call), A[:, :, 0].mean(1), rtol=0, atol=1e-14)


def _in_pairs():
    """A model without positions and images whose patches come in equal pairs, next to each other."""
    model = vision(positions="none")
    image = IMAGES.clone().unflatten(3, (2, 2, 4))
    image[:, :, :, :, 1] = image[:, :, :, :, 0]
    return model, {"pixel_values": image.flatten(3)}


def test_merging_equal_tokens_changes_nothing_with_log_sizes_and_much_without():
    model, batch = _in_pairs()
    with torch.no_grad():
        expected = model(**batch).logits
        for compensate, much in ((True, False), (False, True)):
            given = {"method": "merge", "r": 8, "layers": 1, "compensate": compensate}
            with fullrank.repair(model, "reduce-tokens", batch=batch, **given):
                moved = (model(**batch).logits - expected).abs().max()
            assert (moved > 1e-4) == much
            assert much or moved < 1e-12


def test_pooling_equal_tokens_changes_nothing_with_log_sizes_and_much_without(monkeypatch):
    """Here nothing but a flat ground is dropped: what score keeps the rest is put in its place."""
    model = vision(positions="none")
    ground = torch.arange(16) % 4 < 2
    image = IMAGES.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).clone()
    image[:, :, ground] = 0.3
    image = image.unflatten(2, (4, 4)).transpose(3, 4).reshape(2, 3, 16, 16)
    score = torch.cat([torch.ones(1), torch.where(ground, -1.0, 1.0)]).expand(2, -1)
    monkeypatch.setitem(token_places._SCORES, "frequency", lambda call: score)
    with torch.no_grad():
        expected = model(pixel_values=image).logits
        for compensate, much in ((True, False), (False, True)):
            given = {"layers": 1, "keep": 0.6, "windows": 1, "compensate": compensate}
            with fullrank.repair(model, "reduce-tokens", batch={"pixel_values": image}, **given):
                moved = (model(pixel_values=image).logits - expected).abs().max()
            assert (moved > 1e-4) == much
            assert much or moved < 1e-12


# ---------------------------------------------------------------- costs


def test_the_multiply_accumulates_of_the_paper():
    tiny = {"depth": 12, "width": 192, "patch_inputs": 768, "classes": 1000}
    steps = {layer: Reducing("frequency", 0.7, w * w) for layer, w in zip(quarters(12), (2, 1, 1), strict=True)}
    assert list(steps) == [4, 7, 10]
    found = []
    for chosen in ({}, steps):
        course = token_course(197, chosen, depth=12)
        found.append(token_macs(course, **{k: v for k, v in tiny.items() if k != "depth"}) / 1e9)
    assert_golden("ft-macs-deit-tiny", found)


@pytest.mark.parametrize("method", ["frequency", "merge", "prune"])
@pytest.mark.parametrize("class_token", [True, False])
def test_counted_products_are_those_of_the_formula_and_of_choosing(method, class_token):
    if method == "prune" and not class_token:
        return
    model, p, d = vision(class_token, depth=4, mlp_width=96, biases=False), int(class_token), 32
    with fullrank.repair(model, "reduce-tokens", method=method, batch=BATCH) as repair:
        counted = counted_macs(model, lambda: model(**BATCH)) / 2
    layers = quarters(4) if method != "merge" else (1, 2, 3, 4)
    wide = dict(zip(quarters(4), (2, 1, 1), strict=True))
    steps = {layer: Reducing("frequency", 0.7, wide[layer] ** 2) for layer in quarters(4)}
    if method == "merge":
        r = equal_cost(16 + p, steps, layers, depth=4, width=d, mlp_ratio=3.0, protected=p)
        steps = {layer: Reducing("merge", merged=r) for layer in layers}
    elif method == "prune":
        steps = {layer: Reducing("prune", 0.7, 1) for layer in layers}
    course = token_course(16 + p, steps, depth=4, protected=p)
    expected = token_macs(course, width=d, mlp_ratio=3.0, patch_inputs=48, classes=5, protected=p)
    for layer in layers:
        N = course[layer - 1][0]
        if method == "frequency":
            expected += N * N * d + wide[layer] ** 2 * N * d  # QKᵀ, means by windows
        elif method == "prune":
            expected += N * d + N * d  # q of the class token, the fused token
        else:
            even = len([n for n in range(p, N) if n % 2 == 0])
            expected += even * (N - p - even) * d / 4  # keys of one head's width
    assert counted == expected
    assert f"of {counted_macs(model, lambda: model(**BATCH)) / 2e3:.3g} k multiply-accumulates" in str(repair)


def test_merging_is_as_cheap_as_what_it_is_compared_with_and_one_less_would_not_be():
    steps = {layer: Reducing("frequency", 0.7, 1) for layer in (4, 7, 10)}
    wanted = token_macs(token_course(197, steps, depth=12), width=192)
    r = equal_cost(197, steps, range(1, 13), depth=12, width=192)
    for number, cheap in ((r, True), (r - 1, False)):
        merging = {layer: Reducing("merge", merged=number) for layer in range(1, 13)}
        assert (token_macs(token_course(197, merging, depth=12), width=192) <= wanted) == cheap
    with pytest.raises(RemedyError, match="costs more than this schedule"):
        equal_cost(197, {1: Reducing("prune", 0.1, 0)}, (12,), depth=12, width=192)


# ---------------------------------------------------------------- models

IMAGE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE |= {"image_size": 16, "patch_size": 4}


def _timm(fused=True):
    blocks = [timm_like.Block(timm_like.Attention(fused=fused)) for _ in range(3)]
    return timm_like.ViT(*blocks)


FITS = {
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), 1),
    "vit, eager": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE, attn_implementation="eager")), 1),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**IMAGE)), 2),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE, layerscale_value=0.5)), 1),
    "dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**IMAGE, layerscale_value=0.5)),
        5,
    ),
    "timm": (_timm, 1),
    "timm, explicit": (lambda: _timm(False), 1),
}


def _made(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FITS[name][0]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval(), {"x" if "timm" in name else "pixel_values": IMAGES}


def _states(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", "merge"),
        ("vit, eager", "frequency"),
        ("deit", "prune"),
        ("deit", "merge"),
        ("dinov2", "frequency"),
        ("dinov2 with registers", "frequency"),
        ("dinov2 with registers", "prune"),
        ("timm", "merge"),
        ("timm, explicit", "prune"),
    ],
)
def test_class_tokens_are_left_alone_by_a_reduction_in_the_last_block(name, method):
    """So LayerScale, registers and distillation tokens stand where they stood: only patches become fewer."""
    model, batch = _made(name)
    protected = FITS[name][1]
    with torch.no_grad():
        whole = _states(model(**batch))
    given = {"method": method, "layers": 3, "batch": batch} | ({"r": 4} if method == "merge" else {})
    with fullrank.repair(model, "reduce-tokens", **given) as repair, torch.no_grad():
        left = _states(model(**batch))
    count = protected + {"frequency": 11 + 4, "merge": 12, "prune": 12 + 1}[method]
    assert f"tokens {16 + protected} → {count}" in str(repair)
    if left.ndim == 2:  # of timm's the head's answer from the class token
        torch.testing.assert_close(left, whole, rtol=0, atol=1e-12)
        return
    assert left.shape[1] == count
    torch.testing.assert_close(left[:, :protected], whole[:, :protected], rtol=0, atol=1e-12)


def test_restored_tokens_are_as_many_as_the_patches_and_equal_where_one_stands_for_several():
    model, batch = _made("vit")
    with (
        fullrank.repair(model, "reduce-tokens", batch=batch, restore=True, keep=0.3, windows=1, layers=[1, 2]),
        torch.no_grad(),
    ):
        states = _states(model(**batch))
    assert states.shape[1] == 17
    assert all(len({tuple(row.tolist()) for row in image}) == 1 + 1 + 1 for image in states)  # class, one kept, pooled


def _swin(**options):
    sizes = {"image_size": 32, "patch_size": 4, "num_channels": 3}
    return hf.SwinModel(hf.SwinConfig(embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, **sizes, **options))


UNFIT = {
    "swin": (_swin, torch.randn(2, 3, 32, 32), "inside windows"),
    "windows of timm": (lambda: timm_like.Hierarchy(fused=True, grids=False), IMAGES.float(), "not one attention each"),
    "dinov3": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**IMAGE)),
        IMAGES.float(),
        "answer otherwise where patches change places",
    ),
    "beit": (
        lambda: hf.BeitModel(hf.BeitConfig(**IMAGE, use_relative_position_bias=True)),
        IMAGES.float(),
        "mask or a bias of positions",
    ),
    "rotary": (
        lambda: Transformer(TransformerConfig(kind="vision", depth=2, image=16, positions="rotary")),
        IMAGES.float(),
        "answer otherwise where patches change places",
    ),
    "causal": (
        lambda: Transformer(TransformerConfig(kind="vision", depth=2, image=16, mask="causal")),
        IMAGES.float(),
        "mask or a bias",
    ),
    "parallel": (
        lambda: Transformer(TransformerConfig(kind="vision", depth=2, image=16, parallel=True)),
        IMAGES.float(),
        "summed before",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_cannot_go_on_with_fewer_tokens_are_refused(name):
    make, images, words = UNFIT[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    state = everything(model)
    with pytest.raises(RemedyError, match=words) as caught:
        key = "x" if "timm" in name else "pixel_values"
        fullrank.repair(model, "reduce-tokens", batch={key: images})
    assert "\n" not in str(caught.value)
    assert changes(state, everything(model)) == []


def test_settings_that_do_not_fit_are_refused_in_a_sentence():
    model = vision()
    state = everything(model)
    for parameters, words in (
        ({"layers": 4}, "names block 4, and there are 3"),
        ({"windows": (1, 2)}, "must not grow"),
        ({"windows": 5}, "needs a grid at least as wide"),
        ({"windows": 4}, "no fewer than its 17 tokens"),
        ({"keep": 1.0}, "no fewer"),
        (
            {"keep": (0.7, 0.0)},
            r"keep=\(0.7, 0.0\) of reduce-tokens is not accepted; it is numbers above 0 and at most 1",
        ),
        ({"keep": (0.9, 0.8, 0.7, 0.6)}, "keep= has 4 numbers, and tokens go in 3 blocks"),
        ({"method": "merge", "r": (1, 2, 3, 4)}, "r= has 4 numbers, and tokens go in 3 blocks"),
        ({"protected": 17}, "none is left"),
        ({"method": "prune", "fusion": "none", "restore": True}, "leaves nothing"),
        ({"method": "merg"}, "not known .did you mean"),
    ):
        with pytest.raises(RemedyError, match=words):
            fullrank.repair(model, "reduce-tokens", batch=BATCH, **parameters)
    explicit, batch = _made("timm, explicit")
    with pytest.raises(RemedyError, match="needs keys"):
        fullrank.repair(explicit, "reduce-tokens", method="merge", batch=batch)
    assert changes(state, everything(model)) == []


# ---------------------------------------------------------------- life


@pytest.mark.parametrize("method", ["frequency", "prune"])
def test_blocks_that_are_repeated_in_the_backward_pass_give_the_same_gradients(method):
    model, batch = _made("vit")
    model.train()

    def gradients():
        model.zero_grad()
        model(**batch).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with fullrank.repair(model, "reduce-tokens", method=method, batch=batch):
        plain = gradients()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        again = gradients()
    assert len(plain) == len(again)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["merge", "prune"])
def test_compiled_into_one_graph_it_is_the_same(method):
    model, batch = _made("vit")
    with fullrank.repair(model, "reduce-tokens", method=method, batch=batch), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0], rtol=0, atol=1e-12)
    torch.compiler.reset()


def test_another_grid_than_the_first_is_pooled_by_its_own_windows_and_what_is_none_is_refused():
    model = timm_like.ViT(*[timm_like.Block(timm_like.Attention()) for _ in range(3)]).eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, 16, width, generator=generator) for width in (16, 24)]
    with fullrank.repair(model, "reduce-tokens", batch={"x": images[1]}), torch.no_grad():
        expected = model(images[1])
        assert expected.shape == (2, 10)
    with fullrank.repair(model, "reduce-tokens", batch={"x": images[0]}), torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32, generator=generator)).shape == (2, 10)
        assert torch.equal(model(images[1]), expected)


class _Patches(nn.Module):
    """Patches of any form, by a convolution or by a linear map."""

    def __init__(self, patch, *, linear=False):
        super().__init__()
        self.patch = patch
        self.map = nn.Linear(3 * patch[0] * patch[1], 32) if linear else nn.Conv2d(3, 32, patch, patch)

    def forward(self, images):
        if isinstance(self.map, nn.Conv2d):
            return self.map(images).flatten(2).transpose(1, 2)
        (height, width), cut = self.patch, images
        cut = cut.unfold(2, height, height).unfold(3, width, width).flatten(2, 3)
        return self.map(cut.transpose(1, 2).flatten(2))


def _of_patches(patch, *, linear=False):
    model = vision(class_token=False, positions="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.embedding = _Patches(patch, linear=linear).double()
    return model


@pytest.mark.parametrize(
    ("patch", "first", "image"),
    [
        ((4, 4), (16, 16), (8, 32)),
        ((4, 4), (8, 32), (32, 8)),
        ((2, 8), (16, 16), (16, 16)),
        ((4, 4), (16, 16), (11, 34)),  # the rest of a row or column is cut off
    ],
)
def test_windows_are_those_of_the_grid_of_each_forward(patch, first, image):
    model = _of_patches(patch)
    generator = torch.Generator().manual_seed(2)
    seen, given = (torch.randn(1, 3, *form, generator=generator).double() for form in (first, image))
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    with torch.no_grad():
        with fullrank.repair(model, "reduce-tokens", batch={"pixel_values": seen}, layers=(1, 3), reweigh=False):
            found = model(pixel_values=given).logits[0]
        rule = twin.frequency({1: 2, 3: 1}, side=columns, rows=rows, keep=0.7, sized=True)
        expected = twin.logits(model, given[0], rule, protected=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_without_a_convolution_patches_are_squares_of_one_form_or_nothing_is_said():
    model = _of_patches((4, 4), linear=True)
    wide = torch.randn(1, 3, 8, 32, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        with fullrank.repair(model, "reduce-tokens", batch={"pixel_values": wide}, layers=(1, 3), reweigh=False):
            found = model(pixel_values=wide).logits[0]
            with pytest.raises(EditError, match=r"known for images of \(8, 32\) alone"):
                model(pixel_values=IMAGES)
        rule = twin.frequency({1: 2, 3: 1}, side=8, rows=2, keep=0.7, sized=True)
        torch.testing.assert_close(found, twin.logits(model, wide[0], rule, protected=0), rtol=0, atol=1e-10)
        with fullrank.repair(model, "reduce-tokens", batch={"pixel_values": wide}, windows=1):
            assert model(pixel_values=IMAGES).logits.shape == (2, 5)
    oblong = _of_patches((4, 2), linear=True)
    with pytest.raises(RemedyError, match="beside each other is not known"):
        fullrank.repair(oblong, "reduce-tokens", batch={"pixel_values": IMAGES})


@pytest.mark.parametrize("method", ["frequency", "merge"])
def test_in_half_precision_and_in_copies(method):
    model, batch = _made("vit")
    with fullrank.repair(model, "reduce-tokens", method=method, batch=batch), torch.no_grad():
        expected = model(**batch)[0]
        other = copy.deepcopy(model)
        torch.testing.assert_close(other(**batch)[0], expected, rtol=0, atol=0)
        half = other.to(torch.bfloat16)(pixel_values=IMAGES.bfloat16())[0]
        assert half.shape == expected.shape
        assert torch.isfinite(half).all()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model.float()(pixel_values=IMAGES.float())[0]).all()
        model.double()
