"""The preprocessing that goes with weights, of other sizes and from other libraries' files."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import at_size, from_config, parse
from vit_jax.errors import UserError

IMAGENET = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
BICUBIC = "method='pil_bicubic'"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TIMM = {"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": MEAN, "std": STD}


@pytest.mark.parametrize(
    ("text", "new", "expected"),
    [
        ("resize(224)|value_range(-1, 1)", (384, 384), "resize(384)|value_range(-1, 1)"),
        (
            "resize(224)|uint8|value_range(-1,1)",
            (8, 16),
            "resize((8, 16))|uint8|value_range(-1, 1)",
        ),
        (
            "resize_small(256)|central_crop(224)|value_range(-1, 1)",
            (448, 448),
            "resize_small(512)|central_crop(448)|value_range(-1, 1)",
        ),
        # The crop is 0.9, as timm has it, and not 224 / 248.
        (
            f"resize_small(248, {BICUBIC})|central_crop(224, round_even=True)|{IMAGENET}",
            (384, 384),
            f"resize_small(426, {BICUBIC})|central_crop(384, round_even=True)|{IMAGENET}",
        ),
        (
            "resize((256, 256))|central_crop(224)|value_range(0, 1)",
            (112, 224),
            "resize((128, 256))|central_crop((112, 224))|value_range(0, 1)",
        ),
        (
            "resize_small(256)|central_crop(224)|value_range(0, 1)",
            (112, 448),
            "resize_small((128, 512))|central_crop((112, 448))|value_range(0, 1)",
        ),
        (
            f"resize_small(248, {BICUBIC})|central_crop(224)|value_range(0, 1)",
            (224, 336),
            f"resize_small((248, 373), {BICUBIC})|central_crop((224, 336))|value_range(0, 1)",
        ),
        ("value_range(-1, 1)", (32, 32), None),
        ("resize_small(224)|value_range(-1, 1)", (32, 32), None),
        ("central_crop(224)|value_range(-1, 1)", (32, 32), None),
        ("resize(224)|random_crop(200)", (100, 100), None),
    ],
)
def test_another_size_keeps_method_crop_and_values(text, new, expected):
    found = at_size(text, (224, 224), new)

    assert found == (parse(expected).spec if expected else None)


@pytest.mark.parametrize("fraction", [0.875, 0.9, 0.95, 0.96, 1.0])
@pytest.mark.parametrize("size", [224, 384])
def test_a_crop_of_timm_s_is_the_same_at_any_size(fraction, size):
    asked = {"pretrained_cfg": TIMM | {"crop_pct": fraction}}
    small, other = (from_config(asked, (side, side)) for side in (224, size))

    assert at_size(small, (224, 224), (size, size)) == other
    assert f"resize_small({int(size / fraction)}, " in other


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"crop_pct": 0.9, "crop_mode": "center"},
            "resize_small(248, method='pil_bicubic')|central_crop(224, round_even=True)|"
            + IMAGENET,
        ),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, f"resize(224, method='pil_bicubic')|{IMAGENET}"),
        (
            {"crop_pct": None, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
            "resize_small(256, method='pil_bilinear')|central_crop(224, round_even=True)|"
            "value_range(-1, 1)",
        ),
        (
            {"crop_pct": 0.875, "crop_mode": "squash", "mean": [0, 0, 0], "std": [1, 1, 1]},
            f"resize(256, {BICUBIC})|central_crop(224, round_even=True)|value_range(0, 1)",
        ),
    ],
)
def test_what_timm_s_config_asks_for(asked, expected):
    found = from_config({"architecture": "vit", "pretrained_cfg": TIMM | asked}, (224, 224))

    assert parse(found).range == parse(expected).range
    assert found.rpartition("|")[0] == expected.rpartition("|")[0]


VIT = {"size": 224, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
BIT = {"image_processor_type": "BitImageProcessor", "resample": 3, "crop_size": 224}
BIT |= {"do_center_crop": True, "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (VIT, "resize(224, method='pil_bilinear')|value_range(-1, 1)"),
        (
            VIT | {"size": {"height": 384, "width": 384}, "do_center_crop": False},
            "resize(224, method='pil_bilinear')|value_range(-1, 1)",
        ),
        (
            BIT | {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            f"resize_small(256, {BICUBIC})|central_crop(224)|{IMAGENET}",
        ),
        (
            BIT | {"size": 256},
            f"resize_small(256, {BICUBIC})|central_crop(224)|{IMAGENET}",
        ),
        (
            BIT | {"size": 256, "image_processor_type": "DeiTImageProcessor"},
            f"resize(256, method='pil_bicubic')|central_crop(224)|{IMAGENET}",
        ),
    ],
)
def test_what_a_preprocessor_config_asks_for(asked, expected):
    assert from_config({"model_type": "vit", "preprocessor": asked}, (224, 224)) == expected


def test_what_can_t_be_done_or_understood_is_refused_and_silence_is_none():
    assert from_config({"model_type": "vit", "preprocessor": {}}, (224, 224)) is None
    for asked in [
        {"pretrained_cfg": TIMM | {"crop_mode": "border"}},
        {"pretrained_cfg": TIMM | {"interpolation": "random"}},
        {"pretrained_cfg": TIMM | {"crop_pct": "x"}},
        {"pretrained_cfg": TIMM | {"mean": [1, 2]}},
        {"pretrained_cfg": [3]},
        {"preprocessor": VIT | {"do_resize": False}},
        {"preprocessor": VIT | {"resample": 4}},
        {"preprocessor": VIT | {"rescale_factor": 1 / 127.5}},
        {"preprocessor": VIT | {"size": {"longest_edge": 3}}},
        {"preprocessor": VIT | {"size": [3]}},
    ]:
        with pytest.raises(UserError, match="asks for preprocessing that isn't understood"):
            from_config(asked, (224, 224))


@pytest.mark.parametrize("fraction", [0.875, 0.9, 0.96, 1.0])
def test_a_crop_that_is_not_square_is_the_same_at_any_size(fraction):
    asked = {"pretrained_cfg": TIMM | {"crop_pct": fraction}}
    small, other = from_config(asked, (120, 200)), from_config(asked, (240, 336))

    assert at_size(small, (120, 200), (240, 336)) == other
    assert f"resize_small(({int(240 / fraction)}, {int(336 / fraction)}), " in other


@pytest.mark.parametrize(
    ("shape", "resized"),
    [
        ((60, 100), (13, 22)),  # 13.2: the width decides.
        ((100, 60), (37, 22)),  # 36.7
        ((50, 100), (13, 26)),  # The height.
        ((13, 22), (13, 22)),
        ((7, 100), (13, 186)),  # 185.7
    ],
)
def test_an_image_covers_both_sides_of_a_pair_and_keeps_its_aspect(shape, resized):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    text = from_config({"pretrained_cfg": TIMM | {"crop_pct": 0.9}}, (12, 20))
    assert text.startswith("resize_small((13, 22), method='pil_bicubic')|central_crop((12, 20), ")

    whole = Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC)
    top, left = (round((n - m) / 2) for n, m in zip(resized, (12, 20), strict=True))
    expected = np.asarray(whole)[top : top + 12, left : left + 20]

    np.testing.assert_array_equal(parse(text.rpartition("|")[0])(image), expected)
    assert parse("resize_small((13, 22))")(image).shape == (*resized, 3)


IMAGES = [(60, 90), (91, 53), (233, 300), (224, 224), (501, 230), (60, 100), (30, 100)]


@pytest.mark.reference
@pytest.mark.parametrize("crop", [{"crop_pct": 0.9}, {"crop_pct": 0.875}, {"crop_mode": "squash"}])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 240, (12, 20), (20, 12), (224, 336), (97, 96)])
def test_timm_itself_makes_the_same_image(crop, method, size):
    factory = pytest.importorskip("timm.data.transforms_factory")
    asked = TIMM | {"crop_pct": 1.0, "interpolation": method} | crop
    theirs = factory.transforms_imagenet_eval(
        size, asked["crop_pct"], asked.get("crop_mode"), None, method, mean=MEAN, std=STD
    )
    pair = size if isinstance(size, tuple) else (size, size)
    ours = parse(from_config({"pretrained_cfg": asked}, pair))
    for shape in IMAGES:
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = theirs(Image.fromarray(image)).permute(1, 2, 0).numpy()
        # A grey level is 0.017 here.
        np.testing.assert_allclose(ours(image), expected, atol=1e-5)


@pytest.mark.reference
def test_timm_resizes_every_image_to_the_same_pixels():
    resize = pytest.importorskip("timm.data.transforms").ResizeKeepRatio
    rng = np.random.default_rng(0)
    ours = parse("resize_small((20, 30), method='pil_nearest')")
    for height, width in rng.integers(1, 200, (2000, 2)):
        image = np.zeros((height, width, 3), np.uint8)
        expected = resize.get_params(Image.fromarray(image), (20, 30), 0.0)
        assert list(ours(image).shape[:2]) == expected


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Bit", "Siglip"])
def test_transformers_itself_makes_the_same_image(kind, monkeypatch):
    transformers = pytest.importorskip("transformers")
    name = f"{kind}ImageProcessorPil"
    if not hasattr(transformers, name):
        pytest.skip(f"no {name}")
    processor = getattr(transformers, name)()
    asked = processor.to_dict()
    ours = from_config({"model_type": "vit", "preprocessor": asked}, (224, 224))
    for shape in IMAGES:
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(parse(ours)(image).transpose(2, 0, 1), expected, atol=1e-5)
