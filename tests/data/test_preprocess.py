"""The preprocessing text: what it computes, and that it is parsed strictly."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data import images
from vit_jax.data.ops import OPS
from vit_jax.data.preprocess import parse
from vit_jax.errors import UserError

RNG = np.random.default_rng
IMAGE = RNG(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
GREY = RNG(1).integers(0, 256, (8, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("inception_crop(32)|flip|value_range(-1, 1)", (32, 32)),
        ("resize((16, 24))|value_range(-1, 1)", (16, 24)),
        ("resize_small(48)|central_crop(32)|value_range(0, 1)", (32, 32)),
        ("resize_small(30)", None),
        ("flip|random_shift(2)|gray|rgb", None),
        ("resize(40)|random_shift(4)", (40, 40)),
    ],
)
def test_results_are_float32_of_the_announced_size(spec, size):
    preprocess = parse(spec)
    assert preprocess.output_size == size
    for image in (IMAGE, IMAGE[..., :1]):
        result = preprocess(image, RNG(0))
        assert result.dtype == np.float32
        assert size is None or result.shape[:2] == size


def test_whether_it_is_random_is_known():
    assert parse("inception_crop(8)").random
    assert parse("resize(8)|flip").random
    assert not parse("resize(8)|value_range(-1, 1)").random
    with pytest.raises(TypeError, match="Generator"):
        parse("flip")(IMAGE)


def test_the_same_generator_gives_the_same_image():
    preprocess = parse("inception_crop(16)|flip|random_shift(2)|value_range(-1, 1)")
    np.testing.assert_array_equal(preprocess(IMAGE, RNG(7)), preprocess(IMAGE, RNG(7)))
    assert not np.array_equal(preprocess(IMAGE, RNG(7)), preprocess(IMAGE, RNG(8)))


def test_the_input_stays_as_it_was():
    before = IMAGE.copy()
    parse("flip|random_shift(2)|value_range(-1, 1)|gray")(IMAGE, RNG(0))
    np.testing.assert_array_equal(IMAGE, before)


def test_minus_one_to_one_is_exactly_the_original_formula():
    levels = np.linspace(0, 255, 999, dtype=np.float32)
    result = parse("resize((1, 999))|value_range(-1, 1)")(np.zeros((1, 999, 1), np.uint8))
    np.testing.assert_array_equal(result, -1)
    (step,) = parse("value_range(-1, 1)").steps
    expected = (levels - np.float32(127.5)) / np.float32(127.5)
    np.testing.assert_array_equal(step.apply(levels, RNG(0)), expected)


@given(st.integers(-5, 5), st.integers(1, 9))
def test_value_range_is_linear_between_its_ends(lo, width):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    result = parse(f"value_range({lo}, {lo + width})")(levels)
    np.testing.assert_allclose(result, levels / 255 * width + lo, rtol=0, atol=2e-6)


def test_resize_squashes_the_whole_image_without_rounding():
    result = parse("resize(20)")(IMAGE)
    np.testing.assert_array_equal(result, images.resize(IMAGE, (20, 20)))
    assert (result % 1).any()


def test_resize_small_keeps_the_aspect():
    assert parse("resize_small(20)")(IMAGE).shape == (20, 30, 3)
    assert parse("resize_small(20)")(IMAGE.swapaxes(0, 1)).shape == (30, 20, 3)
    assert parse("resize_small((20, 20))") == parse("resize_small(20)")


def test_resize_small_refuses_what_would_become_huge():
    thin = np.zeros((200_000, 3, 3), np.uint8)
    with pytest.raises(UserError, match="would become 14,933,333 x 224 of 3 channels, expected"):
        parse("resize_small(224)")(thin)


def test_central_crop_takes_the_middle_and_refuses_small_images():
    result = parse("central_crop((20, 30))")(IMAGE)
    np.testing.assert_array_equal(result, IMAGE[20:40, 30:60])
    with pytest.raises(UserError, match="60 x 90, expected 70 x 70"):
        parse("central_crop(70)")(IMAGE)


def test_flip_mirrors_every_second_time():
    preprocess = parse("flip")
    flipped = 0
    for seed in range(400):
        result = preprocess(IMAGE, RNG(seed))
        mirrored = np.array_equal(result, IMAGE[:, ::-1])
        assert mirrored or np.array_equal(result, IMAGE)
        flipped += mirrored
    assert 150 < flipped < 250


def test_random_shift_moves_each_way_and_fills_with_black():
    seen = set()
    for seed in range(300):
        result = parse("random_shift(1)")(GREY, RNG(seed))
        padded = np.pad(GREY, ((1, 1), (1, 1), (0, 0)))
        shifts = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if np.array_equal(result, padded[y : y + 8, x : x + 8])
        ]
        seen.update(shifts)
        assert len(shifts) == 1
    assert len(seen) == 9


def test_gray_is_luma_and_rgb_repeats_it():
    result = parse("gray")(IMAGE)
    np.testing.assert_allclose(result[..., 0], IMAGE @ [0.299, 0.587, 0.114], atol=1e-4)
    np.testing.assert_array_equal(parse("rgb")(GREY), np.repeat(GREY, 3, axis=2))
    np.testing.assert_array_equal(parse("gray")(GREY), GREY)
    np.testing.assert_array_equal(parse("rgb")(IMAGE), IMAGE)


def test_random_crop_takes_every_place_equally_often():
    preprocess = parse("random_crop((59, 88))")
    places = []
    for seed in range(600):
        result = preprocess(IMAGE, RNG(seed))
        found = [
            (y, x)
            for y in range(2)
            for x in range(3)
            if np.array_equal(result, IMAGE[y : y + 59, x : x + 88])
        ]
        assert len(found) == 1
        places += found
    counts = [places.count(place) for place in set(places)]
    assert len(counts) == 6
    assert min(counts) > 60
    with pytest.raises(UserError, match=r"random_crop: .* 60 x 90, expected 61 x 8 or larger"):
        parse("random_crop((61, 8))")(IMAGE, RNG(0))


@pytest.mark.parametrize(
    ("spec", "levels"),
    [
        ("resize((60, 90))|value_range(-1, 1)", IMAGE),
        ("value_range(0, 1)", IMAGE),
        ("gray|rgb", None),
        ("flip", IMAGE[:, ::-1]),
    ],
)
def test_the_range_of_values_can_be_undone_to_look_at_a_image(spec, levels):
    preprocess = parse(spec)
    seed = next(s for s in range(9) if spec != "flip" or RNG(s).random() > 0.5)
    undone = preprocess.undo_range(preprocess(IMAGE, RNG(seed)))
    assert undone.dtype == np.uint8
    if levels is not None:
        np.testing.assert_array_equal(undone, levels)


# The text.


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("resize( 224 )|value_range(-1.0,1)", "resize(224)|value_range(-1, 1)"),
        ("resize(size=(224, 224))", "resize(224)"),
        (" resize((224,192)) ", "resize((224, 192))"),
        ("flip()", "flip"),
        ("inception_crop(224, 0.05, 1)", "inception_crop(224)"),
        ("inception_crop(224, area_max=0.5)", "inception_crop(224, area_max=0.5)"),
        ("value_range(hi=1, lo=0)", "value_range(0, 1)"),
        ("decode | resize(8)", "resize(8)"),
        ("decode", "decode"),
        ("resize(8, True)", "resize(8, antialias=True)"),
        ("resize(8, antialias = False)", "resize(8)"),
        ("randaug(2,10)", "randaug(2, 10)"),
        ("randaug(magnitude=7.5, layers=1)", "randaug(1, 7.5)"),
        ("color_jitter(.4, .4, .4, 0)", "color_jitter(0.4, 0.4, 0.4)"),
        ("random_erasing()", "random_erasing"),
        ("normalize(0.5, .5)", "normalize(0.5, 0.5)"),
        ("normalize((.5,.5,.5), (1, 1, 1))", "normalize(0.5, 1)"),
        ("normalize(std=0.25, mean=(0.4, 0.5, 0))", "normalize((0.4, 0.5, 0), 0.25)"),
    ],
)
def test_spellings_of_the_same_are_equal(written, canonical):
    assert parse(written).spec == canonical
    assert parse(written) == parse(canonical)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resize(8)|filp", r"unknown operation 'filp' .* at position 11; did you mean flip\?"),
        ("xyzzy", "unknown operation 'xyzzy' in 'xyzzy' at position 1; there are decode, "),
        ("", "can't read ''"),
        ("flip|", "can't read '' in 'flip|' at position 6"),
        ("resize(8", r"can't read 'resize\(8'"),
        ("resize", r"missing a required argument: 'size'; expected resize\(size, anti"),
        ("resize(1, 2)", "antialias is 2, expected True or False"),
        (
            "resize(1, False, 'bilinear', 2)",
            r"too many positional arguments; .* method='bilinear'\)",
        ),
        ("resize(0)", "size is 0, expected 1 to 16384 pixels"),
        ("resize(8.5)", "size is 8.5"),
        ("resize(True)", "size is True"),
        ("resize((1, 2, 3))", r"size is \(1, 2, 3\)"),
        ("resize_small((8, 0))", r"size is \(8, 0\), expected 1 to 16384 pixels or"),
        ("resize(99999999)", "size is 99999999"),
        ("value_range(1, -1)", r"expected lo < hi; expected value_range\(lo, hi\)"),
        ("value_range(0, 1e999)", "hi is inf, expected a number"),
        ("value_range(low=0, hi=1)", "argument"),
        ("value_range(a, b)", "not a list of numbers"),
        ("value_range(1, 1, lo=3)", "multiple values"),
        ("flip(1)", "expected flip without arguments"),
        ("inception_crop(8, 0.9, 0.1)", "0 < area_min <= area_max <= 1"),
        ("inception_crop(8, 0)", r"expected inception_crop\(size, area_min=0.05, area_max=1, ant"),
        ("resize(__import__('os'))", "not a list of numbers and names"),
        ("resize(exit())", "not a list of numbers"),
        ("flip|" * 1000, "5000 characters"),
        ("flip|decode", "decode in 'flip|decode' at position 6: images arrive decoded"),
        ("randaug(2)", r"missing .* 'magnitude'; expected randaug\(layers, magnitude\)"),
        ("randaug(0, 10)", "expected 1 to 16 layers and a magnitude of 0 to 30"),
        ("randaug(2, 31)", "expected 1 to 16 layers and a magnitude of 0 to 30"),
        ("randaug(2.5, 10)", "layers is 2.5, expected a whole number"),
        ("randaug(True, 10)", "layers is True, expected a whole number"),
        ("color_jitter(-1, 0, 0)", "expected 0 or more, and a hue of at most 0.5"),
        ("color_jitter(1, 1, 1, 0.6)", "a hue of at most 0.5"),
        ("random_erasing(1.5)", "expected 0 <= p <= 1"),
        ("random_erasing(1, 0)", "0 < area_min <= area_max <= 1"),
        (
            "resize(8)|value_range(-1, 1)|randaug(2, 9)",
            "at position 30 works on values of 0 to 255: put it before value_range",
        ),
        ("normalize(0, 1)|randaug(2, 9)", "put it before normalize"),
        ("normalize(0.5)", r"missing .* 'std'; expected normalize\(mean, std\)"),
        (
            f"normalize(({'0.5, 0.4, ' * 65}), 1)",
            r"mean is .*, expected a number, or one a channel",
        ),
        ("normalize((1, True, 0), 1)", r"mean is \(1, True, 0\), expected a number"),
        (
            "normalize(123.7, 58.4)",
            "expected a mean of 0 to 1 and a std of more than 0 to 1: 255 is 1",
        ),
        ("normalize(0.5, (0.2, 0.2, 0))", "a std of more than 0 to 1"),
        ("normalize(0, 9" + "9" * 400 + ")", "std is a?.*, expected a number"),
    ],
)
def test_mistakes_are_told_with_their_place_and_what_was_expected(spec, message):
    with pytest.raises(UserError, match=message) as error:
        parse(spec)
    assert "\n" not in str(error.value)


def test_evaluation_refuses_random_operations():
    assert parse("resize(8)", train=False).spec == "resize(8)"
    with pytest.raises(UserError, match=r"flip in .* at position 11 is random"):
        parse("resize(8)|flip", train=False)


names = st.sampled_from(list(OPS))
numbers = st.one_of(st.integers(-3, 400), st.floats(-2, 2), st.just("(3, 4)"), st.just("lo=0"))
calls = st.builds(
    lambda n, a: f"{n}({', '.join(map(str, a))})", names, st.lists(numbers, max_size=3)
)
junk = st.text(alphabet="aeflipresz0123456789()|,.=-+_ \n*'\"\x00", max_size=40)


@given(st.one_of(st.text(max_size=60), junk, st.lists(calls | names | junk).map("|".join)))
@settings(deadline=None, max_examples=150)
def test_any_text_parses_to_a_stable_spelling_or_is_a_user_error(text):
    try:
        preprocess = parse(text)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert parse(preprocess.spec).spec == preprocess.spec
    assert "\n" not in message


@pytest.mark.parametrize(
    "arguments", ["-" * 900 + "1", "(" * 300 + ")" * 300, "9" * 900, "1" + "-1" * 400]
)
def test_hostile_arguments_are_user_errors(arguments):
    with pytest.raises(UserError):
        parse(f"resize({arguments})")


# Normalising, by whoever reads or on the device.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = f"normalize({MEAN}, {STD})"


def test_normalize_is_the_field_s_mean_and_std_of_images_in_0_to_1():
    found = parse(IMAGENET)(IMAGE)
    expected = (IMAGE / 255 - np.array(MEAN)) / np.array(STD)  # As torchvision's Normalize.
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    grey = parse("normalize(0.1307, 0.3081)")(GREY)
    np.testing.assert_allclose(grey, (GREY / 255 - 0.1307) / 0.3081, rtol=0, atol=2e-6)


def test_a_mean_and_std_of_a_half_are_the_range_of_minus_one_to_one():
    half, original = parse("normalize(0.5, 0.5)"), parse("value_range(-1, 1)")
    assert half.normalize == original.normalize
    np.testing.assert_array_equal(half(IMAGE), original(IMAGE))
    assert str(original.range) == "-1 to 1"
    assert str(parse("resize(8)").range) == "0 to 255"
    assert str(parse(IMAGENET).range) == "-2.1179 to 2.24891, -2.03571 to 2.42857, -1.80444 to 2.64"


def test_values_for_three_channels_refuse_an_image_of_one():
    with pytest.raises(UserError, match="values for 3 channels and an image of 1; put rgb or gray"):
        parse(IMAGENET)(GREY)
    assert parse(f"rgb|{IMAGENET}")(GREY).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "ending", ["value_range(-0.5, 2)", IMAGENET, "normalize(0.4, (1, 0.5, 1))"]
)
def test_the_device_normalises_as_whoever_reads(ending):
    whole = parse(f"resize(20)|flip|{ending}")
    for before in (whole.without_normalize(), whole.without_normalize(as_uint8=True)):
        assert before.spec == "resize(20)|flip"
        images = before(IMAGE, RNG(1))
        assert images.dtype == before.dtype
        on_device = jax.jit(whole.normalize)(images)
        assert on_device.dtype == np.float32
        np.testing.assert_allclose(on_device, whole.normalize(images), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        whole.normalize(whole.without_normalize()(IMAGE, RNG(1))), whole(IMAGE, RNG(1))
    )


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (-0.5, 2), (0.1, 0.9)])
def test_a_range_on_the_device_is_bit_for_bit_what_it_always_was(low, high):
    def formula(images):
        images = (images.astype(np.float32) - 127.5) / 127.5
        return images * ((high - low) / 2) + (high + low) / 2

    normalize = parse(f"value_range({low}, {high})").normalize
    np.testing.assert_array_equal(jax.jit(normalize)(IMAGE), jax.jit(formula)(IMAGE))


@pytest.mark.parametrize("ending", ["value_range(-1, 1)", IMAGENET])
def test_a_device_s_uint8_images_can_be_looked_at_again(ending):
    preprocess = parse(ending)
    for seen in (preprocess(IMAGE), np.asarray(jax.jit(preprocess.normalize)(IMAGE))):
        np.testing.assert_array_equal(preprocess.undo_range(seen), IMAGE)


def test_whole_levels_leave_the_range_to_the_device():
    whole = parse("resize(5)|gray|value_range(0, 1)")
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)

    levels, normalize = whole.split(as_uint8=True)

    assert normalize.bounds == ((0,), (1,))
    assert levels.spec == "resize(5)|gray"
    found = levels(image)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.rint(whole(image) * 255))


@pytest.mark.parametrize("size", [(300, 200), (40, 50), (224, 224)])
@pytest.mark.parametrize(
    "ops",
    [
        "inception_crop(64)|flip",
        "resize(50, antialias=True)",
        "resize_small(70)|random_crop(64)|random_shift(3)",
        "resize(60)|resize(90)|flip",
        "inception_crop(48)|gray",
        "resize(30)|uint8",
        "inception_crop(64)|randaug(2, 10)|random_erasing",
    ],
)
def test_whole_levels_are_those_of_the_rounded_floats(ops, size):
    floats = parse(ops)
    levels, _ = parse(f"{ops}|value_range(-1, 1)").split(as_uint8=True)
    image = RNG(0).integers(0, 256, (*size, 3), np.uint8)
    for seed in range(5):
        expected = images.to_uint8(floats(image, RNG(seed)))
        np.testing.assert_array_equal(levels(image, RNG(seed)), expected)


@pytest.mark.parametrize(
    "spec", ["resize(5)", "value_range(0, 1)|flip", "value_range(0, 255)|value_range(0, 1)"]
)
def test_only_a_range_at_the_end_can_be_left(spec):
    assert parse(spec).split() == (parse(spec), None)
    with pytest.raises(ValueError, match="doesn't end with its only normalisation"):
        parse(spec).without_normalize()


def test_a_range_of_several_channels_has_bounds_for_each():
    low, high = parse(IMAGENET).range.bounds
    np.testing.assert_allclose((min(low), max(high)), (-2.117904, 2.64), rtol=1e-6)


def test_without_any_operation_whole_images_are_taken():
    levels, _ = parse("value_range(-1, 1)").split(as_uint8=True)
    assert levels.crop_box((3, 5), np.random.default_rng(0)) is None
