import sys

import pytest
import torch
from PIL import Image

from fullrank.errors import BatchError
from fullrank.spec import Subject, inputs, load
from fullrank.spec.images import synthetic

VIT = "num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&image_size=32&patch_size=8"


@pytest.fixture(scope="module")
def vit():
    return load(f"arch:vit?{VIT}")


@pytest.fixture
def pictures(tmp_path):
    """Three images of different sizes and modes."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (20, 50), 128).save(tmp_path / "a.jpg")
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "c.png")
    return tmp_path


def refused(says, subject, **options):
    with pytest.raises(BatchError, match=says) as caught:
        inputs(subject, **options)
    assert "\n" not in str(caught.value)


def runs(subject, given):
    with torch.no_grad():
        return [subject.model(**batch) for batch in given.batches]


# ---------------------------------------------------------------- images


def test_a_vision_model_sees_synthetic_images_and_the_report_says_so(vit):
    given = inputs(vit)
    assert given.kind == "synthetic images"
    assert "smooth random fields" in given.description
    assert given.batches[0]["pixel_values"].shape == (8, 3, 32, 32)
    assert given.sequences == 8
    assert given.tokens is None
    runs(vit, given)


def test_synthetic_images_are_standardised_different_and_of_growing_smoothness(vit):
    images = synthetic(vit, count=8, seed=0)
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((1, 2, 3)), torch.ones(8))
    steps = images.diff(dim=3).square().mean((1, 2, 3))
    assert bool((steps.diff() < 0).all())
    assert torch.equal(images, synthetic(vit, count=8, seed=0))
    assert not torch.equal(images, synthetic(vit, count=8, seed=1))


def test_image_files_are_resized_and_scaled_without_a_processor(vit, pictures):
    given = inputs(vit, images=[pictures / "b.png", pictures / "c.png"])
    pixels = given.batches[0]["pixel_values"]
    assert given.kind == "images"
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels[0, 0].unique().tolist() == [1.0]
    assert pixels[0, 1].unique().tolist() == [-1.0]
    runs(vit, given)


def test_directories_and_patterns_stand_for_their_images_in_order(vit, pictures):
    (pictures / "notes.txt").write_text("no image")
    assert inputs(vit, images=pictures).sequences == 3
    assert inputs(vit, images=str(pictures / "*.png")).sequences == 2
    assert inputs(vit, images=pictures, documents=1).batches[0]["pixel_values"].std() < 0.1  # a.jpg is grey
    assert inputs(vit, images=[str(pictures / "*.png"), pictures / "a.jpg"] * 4).sequences == 12


def test_a_checkpoints_processor_prepares_images(tmp_path, vit, pictures):
    from transformers import AutoImageProcessor

    from fullrank.spec.quiet import quiet

    with quiet():
        vit.model.save_pretrained(tmp_path / "vit")
        (tmp_path / "vit" / "preprocessor_config.json").write_text(
            '{"image_processor_type": "ViTImageProcessor", "do_normalize": true, "image_mean": [0, 0, 0], '
            '"image_std": [2, 2, 2], "do_resize": true, "size": {"height": 32, "width": 32}}'
        )
        processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    subject = load(str(tmp_path / "vit"))
    assert type(subject.image_processor) is type(processor)
    given = inputs(subject, images=pictures / "b.png")
    assert "image processor" in given.description
    torch.testing.assert_close(given.batches[0]["pixel_values"][0, 0], torch.full((32, 32), 0.5))


def test_a_processor_that_is_there_but_cannot_be_loaded_is_noted(tmp_path, vit, pictures):
    from fullrank.spec.quiet import quiet

    with quiet():
        vit.model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    subject = load(str(tmp_path / "vit"))
    assert subject.image_processor is None
    assert subject.notes[0].startswith("its image processor could not be loaded: ")
    assert "resizing" in inputs(subject, images=pictures / "b.png").description


def test_images_that_cannot_be_read_are_named(vit, pictures):
    (pictures / "broken.png").write_bytes(b"no image at all")
    (pictures / "cut.png").write_bytes((pictures / "b.png").read_bytes()[:60])
    (pictures / "empty").mkdir()
    refused("nowhere.png.* cannot be read: No such file", vit, images=pictures / "nowhere.png")
    refused("broken.png.* is no image", vit, images=pictures / "broken.png")
    refused("cut.png", vit, images=pictures / "cut.png")
    refused("matches no file", vit, images=str(pictures / "*.bmp"))
    refused("without image files", vit, images=pictures / "empty")
    refused("names no file", vit, images=[])


def test_without_pillow_the_extra_is_named(vit, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(r"pip install 'fullrank\[hf\]'", vit, images=pictures)


def test_a_vision_model_reads_no_text(vit):
    refused("reads vision input; it takes images=", vit, text="the tide")
    refused("context=12 was given", vit, context=12)


def test_video_models_see_images_held_still():
    subject = load(f"arch:videomae?{VIT}&num_frames=4&decoder_num_hidden_layers=1")
    given = inputs(subject, documents=2)
    assert given.batches[0]["pixel_values"].shape == (2, 4, 3, 32, 32)
    assert "held still for 4 frames" in given.description
    runs(subject, given)


def test_two_towers_get_text_and_images_in_pairs():
    tower = "{0}.num_hidden_layers=1&{0}.hidden_size=8&{0}.intermediate_size=8&{0}.num_attention_heads=2"
    pieces = [tower.format(part) for part in ("text_config", "vision_config")]
    pieces += ["text_config.vocab_size=30", "vision_config.image_size=32", "vision_config.patch_size=8"]
    subject = load("arch:clip?" + "&".join(pieces))
    given = inputs(subject, documents=4, context=10)
    assert given.kind == "text and images"
    assert given.batches[0]["input_ids"].shape == (4, 10)
    assert given.batches[0]["pixel_values"].shape == (4, 3, 32, 32)
    assert given.sequences == 4
    runs(subject, given)


# ---------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("spec", "name", "shape"),
    [
        (
            "arch:whisper?d_model=8&encoder_layers=1&decoder_layers=1&encoder_attention_heads=2&decoder_attention_heads=2"
            "&encoder_ffn_dim=8&decoder_ffn_dim=8&vocab_size=40&max_source_positions=20&pad_token_id=0"
            "&decoder_start_token_id=1",
            "input_features",
            (1, 80, 40),
        ),
        (
            "arch:audio-spectrogram-transformer?hidden_size=8&num_hidden_layers=1&num_attention_heads=2"
            "&intermediate_size=8&max_length=64&num_mel_bins=32",
            "input_values",
            (1, 64, 32),
        ),
        (
            "arch:wav2vec2?hidden_size=16&num_hidden_layers=1&num_attention_heads=2&intermediate_size=8"
            "&num_conv_pos_embedding_groups=2",
            "input_values",
            (1, 16000),
        ),
    ],
)
def test_speech_models_hear_synthetic_sound_of_their_shape(spec, name, shape):
    subject = load(spec)
    given = inputs(subject, documents=2)
    assert given.kind == "synthetic sound"
    assert [tuple(batch[name].shape) for batch in given.batches] == [shape] * 2
    sound = given.batches[1][name]
    assert abs(float(sound.mean())) < 1e-4
    assert abs(float(sound.std()) - 1) < 1e-3
    runs(subject, given)


# ---------------------------------------------------------------- batches from Python


def of(batch, model=None):
    return Subject(model=model or torch.nn.Linear(2, 2), name="python:m:f", description="", fresh=None, batch=batch)


@pytest.mark.parametrize("batch", [torch.ones(3, 2), (torch.ones(3, 2), None), {"x": torch.ones(3, 2)}])
def test_a_factorys_batch_is_passed_on_as_it_is(batch):
    given = inputs(of(batch))
    assert given.batches[0] is batch
    assert given.kind == "given"
    assert given.sequences == 3
    assert given.real == [None]


def test_a_factorys_attention_mask_says_which_tokens_are_real():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    given = inputs(of({"input_ids": torch.ones(2, 3), "attention_mask": mask}))
    assert torch.equal(given.real[0], mask.bool())
    assert given.tokens == 5


def test_a_model_of_which_nothing_is_known_needs_a_batch():
    refused("return \\(model, batch\\)", of(None))
    refused("holds no tensor", of({"x": 3}))
    refused("holds no tensor", of(torch.tensor(3)))
    refused("takes only a batch from Python", of(None), text="the tide")
