"""Decoding agrees with PIL, and damaged files are named."""

import io
import os
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vit_jax.data import headers, images, parse
from vit_jax.errors import UserError


def smooth_image(height=40, width=60):
    noise = np.random.default_rng(0).uniform(0, 255, (height, width, 3)).astype(np.float32)
    blurred = cv2.GaussianBlur(noise, (9, 9), 3)
    scaled = (blurred - blurred.min()) / np.ptp(blurred) * 255
    return Image.fromarray(scaled.astype(np.uint8))


IMAGE = smooth_image()
ALPHA = IMAGE.copy()
ALPHA.putalpha(Image.linear_gradient("L").resize(IMAGE.size))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_pil(data, mode):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))


FILES = {
    "jpeg": encoded(IMAGE, "JPEG", quality=95),
    "progressive jpeg": encoded(IMAGE, "JPEG", progressive=True),
    "grey jpeg": encoded(IMAGE.convert("L"), "JPEG"),
    "cmyk jpeg": encoded(IMAGE.convert("CMYK"), "JPEG"),
    "png": encoded(IMAGE, "PNG"),
    "grey png": encoded(IMAGE.convert("L"), "PNG"),
    "black and white png": encoded(IMAGE.convert("1"), "PNG"),
    "palette png": encoded(IMAGE.quantize(64), "PNG"),
    "palette png, one colour transparent": encoded(IMAGE.quantize(64), "PNG", transparency=3),
    "rgba png": encoded(ALPHA, "PNG"),
    "grey png with alpha": encoded(ALPHA.convert("LA"), "PNG"),
    "webp": encoded(IMAGE, "WEBP"),
    "lossless webp with alpha": encoded(ALPHA, "WEBP", lossless=True, exact=True),
    "bmp": encoded(IMAGE, "BMP"),
    "palette bmp": encoded(IMAGE.quantize(64), "BMP"),
    "gif": encoded(IMAGE.quantize(64), "GIF"),
    "animated gif": encoded(
        IMAGE.quantize(64), "GIF", save_all=True, append_images=[IMAGE.rotate(180).quantize(64)]
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_decodes_as_with_pil(kind):
    image = images.decode(FILES[kind])
    expected = with_pil(FILES[kind], "RGB")
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_decodes_to_one_channel(kind):
    image = images.decode(FILES[kind], channels=1)
    expected = with_pil(FILES[kind], "L")
    assert image.shape == (*expected.shape, 1)
    # JPEG stores luma itself; PIL computes it anew from the rounded RGB.
    assert np.abs(image[..., 0].astype(int) - expected).max() <= (4 if "jpeg" in kind else 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(IMAGE, kind, exif=exif)
    image = images.decode(data)
    assert np.abs(image.astype(int) - with_pil(data, "RGB")).max() <= 1
    assert image.shape == ((40, 60, 3) if orientation <= 4 else (60, 40, 3))


def test_16_bit_values_stay():
    values = np.random.default_rng(0).integers(0, 2**16, (20, 30, 3), dtype=np.uint16)
    data = cv2.imencode(".png", values[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(images.decode(data), values)
    grey = cv2.imencode(".png", values[..., 0])[1].tobytes()
    np.testing.assert_array_equal(images.decode(grey, channels=1), values[..., :1])
    np.testing.assert_array_equal(images.decode(grey), np.repeat(values[..., :1], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_errors_and_not_half_a_image(kind, kept, capfd):
    data = encoded(IMAGE.quantize(64) if kind == "GIF" else IMAGE, kind)
    with pytest.raises(
        UserError, match=r"^a/b\.jpg: truncated or damaged .*(JPEG|PNG|WebP|BMP|GIF)"
    ):
        images.decode(data[: int(len(data) * kept)], name="a/b.jpg")
    assert capfd.readouterr().err == ""


def test_a_jpeg_filled_up_with_zeros_is_truncated():
    data = FILES["jpeg"]
    with pytest.raises(UserError, match="truncated"):
        images.decode(data[: len(data) // 2] + bytes(len(data) // 2))


def test_bytes_after_the_end_do_no_harm():
    np.testing.assert_array_equal(
        images.decode(FILES["jpeg"] + b"\0\0tail"), images.decode(FILES["jpeg"])
    )


def png_chunk(name, content, check=None):
    check = zlib.crc32(name + content) if check is None else check
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile")),
        png_chunk(b"iCCP", b"x", check=0),
        png_chunk(b"tEXt", b"a\0b", check=0),
        png_chunk(b"sRGB", b"\x09"),
        png_chunk(b"tIME", bytes(7)),
    ],
)
def test_what_a_png_says_beside_its_pixels_is_passed_over_in_silence(chunk, capfd):
    data = encoded(IMAGE, "PNG")
    np.testing.assert_array_equal(images.decode(data[:33] + chunk + data[33:]), images.decode(data))
    assert capfd.readouterr().err == ""


def test_a_png_that_hides_its_size_behind_something_else_is_damaged():
    data = FILES["png"]
    with pytest.raises(UserError, match="damaged PNG"):
        images.decode(data[:8] + png_chunk(b"tIME", bytes(7)) + data[8:])


def test_a_png_with_a_wrong_byte_is_damaged(capfd):
    data = bytearray(encoded(IMAGE, "PNG"))
    data[data.index(b"IDAT") + 30] ^= 1
    with pytest.raises(UserError, match="damaged PNG"):
        images.decode(bytes(data))
    assert capfd.readouterr().err == ""


STARTS = [
    *(b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\xff\0\0\0WEBPVP8 ", b"BM"),
    *(b"II\x2a\0\x08\0\0\0", b"MM\0\x2a\0\0\0\x08", b"II\x2b\0\x08\0\0\0\x10"),
    *(b"\0\0\0\x14ftypavif\0\0\0\0", b"\0\0\0\x14ftypheic\0\0\0\0"),
    *(
        b"\x93NUMPY\x01\0v\0",
        b"\x93NUMPY\x01\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': ",
    ),
]


@given(st.binary(max_size=200), st.sampled_from(STARTS))
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_give_one_line_errors(data, start):
    with pytest.raises(UserError) as error:
        images.decode(start + data, name="x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG2000", "PPM"])
def test_other_kinds_are_refused_though_opencv_knows_them(kind):
    data = encoded(IMAGE, kind)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
    what = "JPEG 2000, which is not read" if kind == "JPEG2000" else "not an image"
    with pytest.raises(UserError, match=rf"{what}.* expected JPEG, PNG"):
        images.decode(data)


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello, I am a text")
    for name, reason in [
        ("empty.jpg", "empty file"),
        ("text.jpg", "not an image"),
        ("missing.jpg", "No such file"),
    ]:
        with pytest.raises(UserError, match=f"{name}.*{reason}"):
            images.read(tmp_path / name)


def test_a_file_too_large_for_an_image_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 15 * 10**12)
    expected = r"sparse\.png: 15,000,000,000,000 bytes, expected .* 2,147,483,648 at most"
    with pytest.raises(UserError, match=expected):
        images.content(tmp_path / "sparse.png")


def zip_bomb(side=24_000):
    """A black and white PNG of 72 MB in 0.1 MB; as RGB it would take 1.7 GB."""

    def chunk(kind, data):
        return (
            struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    packed = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def enlarged(kind):
    """A file whose header announces an image far larger than what follows."""
    data = bytearray(FILES.get(kind, b""))
    if kind == "png":
        data[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "jpeg":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = b"\xff\xff\xff\xff"
    elif kind == "gif":
        data[6:10] = b"\xff\xff\xff\xff"
    elif kind == "bmp":
        data[18:26] = struct.pack("<ii", 100_000, -100_000)
    elif kind == "webp":
        data[26:30] = b"\xff\x3f\xff\x3f"
    else:
        at = 24 if data[12:16] == b"VP8X" else 21
        data[at : at + 6] = b"\xff" * 6
    return bytes(data)


def test_a_zip_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(zip_bomb())
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    monkeypatch.setattr(cv2, "imdecode", lambda *args: pytest.fail("it was decoded"))
    message = r"bomb\.png: a PNG image of 24,000 x 24,000 pixels, expected 178,956,970 at most"
    with pytest.raises(UserError, match=message):
        images.read(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "kind",
    [
        "png",
        "jpeg",
        "gif",
        "bmp",
        "webp",
        "lossless webp with alpha",
    ],
)
def test_every_kind_of_file_has_to_announce_a_bearable_size(kind, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *args: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match=r"^image: a \w+ image of [\d,]+ x [\d,]+ pixels, exp"):
        images.decode(enlarged(kind))


@pytest.mark.parametrize("kind", FILES)
def test_the_announced_size_is_the_size(kind, monkeypatch):
    monkeypatch.setattr(headers, "MAX_PIXELS", 40 * 60)
    assert images.decode(FILES[kind]).shape == (40, 60, 3)
    monkeypatch.setattr(headers, "MAX_PIXELS", 40 * 60 - 1)
    with pytest.raises(UserError, match="of 60 x 40 pixels, expected 2,399 at most"):
        images.decode(FILES[kind])


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20), (20, 20_000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "spec", ["inception_crop(32)|flip", "resize(32)", "resize_small(32)|central_crop(32)"]
)
def test_specks_and_strips_are_images_too(size, kind, spec):
    image = images.decode(encoded(Image.new("RGB", size, (200, 100, 50)), kind))
    assert image.shape == (size[1], size[0], 3)
    seen = parse(spec)(image, np.random.default_rng(0))
    assert seen.shape == (32, 32, 3)
    np.testing.assert_allclose(seen, np.broadcast_to([200, 100, 50], seen.shape), atol=2)


def test_real_photographs_decode_as_with_pil(shared):
    files = sorted((shared / "images" / "imagenet_samples").iterdir())[::10]
    for file in files:
        expected = np.asarray(Image.open(file).convert("RGB"))
        assert np.abs(images.read(file).astype(int) - expected).max() <= 1


def bilinear(image, height, width):
    """Half-pixel bilinear interpolation in float64, written from its definition."""

    def axis(old, new):
        centre = (np.arange(new) + 0.5) * old / new - 0.5
        low = np.floor(centre)
        neighbours = np.clip([low, low + 1], 0, old - 1).astype(int)
        return *neighbours, centre - low

    y0, y1, dy = axis(image.shape[0], height)
    x0, x1, dx = axis(image.shape[1], width)
    image = image.astype(np.float64)
    rows = image[y0] * (1 - dy)[:, None, None] + image[y1] * dy[:, None, None]
    return rows[:, x0] * (1 - dx)[:, None] + rows[:, x1] * dx[:, None]


sides = st.integers(1, 90)


@given(sides, sides, sides, sides, st.sampled_from([1, 3]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_resizing_is_bilinear_with_half_pixel_centres(height, width, high, wide, channels, halve):
    if halve:  # a factor of exactly 2 takes another path in OpenCV
        high, wide = max(height // 2, 1), max(width // 2, 1)
    rng = np.random.default_rng(height * width)
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    resized = images.resize(image, (high, wide))
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, bilinear(image, high, wide), rtol=0, atol=1e-3)


def test_resizing_a_photograph_strongly_stays_exact():
    image = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        images.resize(image, (224, 224)), bilinear(image, 224, 224), rtol=0, atol=1e-3
    )


def test_decoding_warns_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in FILES.values():
            images.decode(data)


JPEGS = {
    **{name: data for name, data in FILES.items() if "jpeg" in name},
    **{f"4:{s}": encoded(IMAGE, "JPEG", subsampling=f"4:{s}") for s in ("4:4", "2:2", "2:0")},
    "with restarts": encoded(IMAGE, "JPEG", restart_marker_rows=1),
    "with a profile": encoded(IMAGE, "JPEG", icc_profile=b"profile" * 100),
    "turned": encoded(
        IMAGE,
        "JPEG",
        exif=struct.pack("<6s4sIHHHIIHI", b"Exif\0\0", b"II*\0", 8, 1, 0x112, 3, 1, 6, 0, 0),
    ),
    "with a tail": FILES["jpeg"] + b"\0\0tail",
    "png": FILES["png"],
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_is_cut_from_the_whole_and_nothing_is_said(kind, channels, capfd):
    whole = images.decode(JPEGS[kind], channels=channels)
    for bottom in range(1, len(whole) + 1):
        box = (bottom // 3, 5, bottom - bottom // 3, 20)
        part = images.decode(JPEGS[kind], channels=channels, box=box)
        np.testing.assert_array_equal(part, whole[box[0] : bottom, 5:25])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", JPEGS)
def test_a_header_that_promises_the_size_of_the_image_keeps_it(kind):
    header = headers.read_header(JPEGS[kind])
    plain = kind in ("jpeg", "grey jpeg", "cmyk jpeg", "with a profile", "with a tail")
    assert header.plain == (plain or kind.startswith("4:"))
    assert not header.plain or header.size == images.decode(JPEGS[kind]).shape[:2]


def test_rows_below_a_part_are_not_decoded(monkeypatch):
    data = encoded(smooth_image(400, 300), "JPEG")
    heights, imdecode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *a: heights.append(len(i := imdecode(*a))) or i)
    images.decode(data, box=(10, 20, 30, 40))
    assert heights == [42]


def half_of_a_jpeg(data):
    return data[: len(data) // 2] + b"\xff\xd9"


@pytest.mark.parametrize("kind", [k for k in JPEGS if k not in ("png", "with a tail")])
def test_half_a_jpeg_with_an_end_marker_is_damaged(kind):
    with pytest.raises(UserError, match=r"^x\.jpg: truncated or damaged JPEG file"):
        images.decode(half_of_a_jpeg(JPEGS[kind]), name="x.jpg")


def test_of_half_a_jpeg_the_upper_part_is_read_and_no_grey():
    data = encoded(smooth_image(400, 300), "JPEG", quality=95)
    whole = images.decode(data)
    part = images.decode(half_of_a_jpeg(data), box=(0, 0, 150, 300))
    np.testing.assert_array_equal(part, whole[:150])
    with pytest.raises(UserError, match="truncated or damaged JPEG"):
        images.decode(half_of_a_jpeg(data), box=(0, 0, 350, 300))


def test_a_grey_corner_is_no_damage():
    data = encoded(Image.new("RGB", (300, 400), (128, 128, 128)), "JPEG")
    assert (images.decode(data, box=(0, 0, 100, 300)) == 128).all()


def test_what_libjpeg_finds_behind_the_last_pixel_is_said_and_no_damage():
    data = FILES["jpeg"]
    remarks = []
    image = images.decode(data[:-2] + bytes(20) + data[-2:], remarks=remarks)
    np.testing.assert_array_equal(image, images.decode(data))
    (remark,) = remarks
    assert "extraneous bytes before marker 0xd9" in remark
