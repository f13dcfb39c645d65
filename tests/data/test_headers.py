"""What a file tells of itself, before anything is decoded: kind, size, channels, type, work."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data import headers, images
from vit_jax.errors import UserError

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def encoded(kind, image=IMAGE, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def undecoded(monkeypatch):
    """Has a test fail if something is decoded."""
    for module, name in ((cv2, "imdecode"), (simplejpeg, "decode_jpeg"), (np, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("it was decoded"))
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *a, **k: pytest.fail("decoded"))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded("JPEG"), "JPEG"),
        (encoded("PNG"), "PNG"),
        (encoded("GIF"), "GIF"),
        (encoded("WEBP"), "WebP"),
        (encoded("BMP"), "BMP"),
        (encoded("TIFF"), "TIFF"),
        (tiff(np.zeros((9, 9), "u2"), byteorder=">", bigtiff=True), "TIFF"),
        (encoded("AVIF"), "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (npy(np.zeros((9, 9))), "NumPy"),
        (b"RIFF\x10\0\0\0WAVEfmt ", None),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp41", None),
        (b"PK\3\4", None),
        (b"", None),
    ],
)
def test_the_kind_follows_from_the_first_bytes(data, kind):
    assert headers.kind_of(data) == headers.kind_of(data[:64]) == kind


# A size that is announced where another reader looks.


def with_frame(before, size=(30_000, 30_000)):
    """A JPEG with something before the segment of its size."""
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0")
    return data[:at] + before + data[at : at + 5] + struct.pack(">HH", *size) + data[at + 9 :]


@pytest.mark.parametrize(
    "before",
    [
        b"\0",
        b"junk",
        b"\xff\0",
        b"\xff\0\xff\xff\0",
        b"\xff\xd0",  # A restart, which has no length.
        b"\xff\x01",
        b"\xff\xfe\0\x04\xff\xd9",
    ],
)
def test_no_junk_hides_the_size_of_a_jpeg(before, undecoded, monkeypatch):
    monkeypatch.setattr(headers, "_MOST_PIXELS_A_BYTE", 10**9)
    with pytest.raises(UserError, match="JPEG image of 30,000 x 30,000 pixels"):
        images.decode(with_frame(before))


@pytest.mark.parametrize("before", [b"\0", b"junk", b"\xff\0", b"\xff\xff"])
def test_junk_before_an_honest_size_does_no_harm(before):
    data = with_frame(before, (40, 60))
    assert headers.read_header(data).size == (40, 60)
    np.testing.assert_array_equal(images.decode(data), images.decode(encoded("JPEG")))


def test_a_jpeg_of_more_pixels_than_its_bytes_can_hold_is_damaged(undecoded):
    with pytest.raises(UserError, match="truncated or damaged JPEG"):
        images.decode(with_frame(b"", (5_000, 5_000)))


def test_a_jpeg_without_a_size_is_damaged(undecoded):
    data = encoded("JPEG")
    with pytest.raises(UserError, match="truncated or damaged JPEG"):
        images.decode(data.replace(b"\xff\xc0", b"\xff\xec"))


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(undecoded):
    data = encoded("JPEG", Image.new("RGB", (2000, 2000)), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2][:14]
    with pytest.raises(UserError, match=r"of 2,000 x 2,000 pixels in 3,\d\d\d scans, which would"):
        images.decode(data[:-2] + 3000 * last + data[-2:])


def png(width, height, bits, colours):
    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(20_000, 8_000, 16, 2), "PNG image of 20,000 x 8,000 pixels and 3 channels of uint16"),
        (
            b"\x93NUMPY\x01\0\x56\0"
            + b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000, 10000, 12), }".ljust(85)
            + b"\n",
            "NumPy image of 10,000 x 10,000 pixels and 12 channels of float64",
        ),
        (encoded("AVIF").replace(struct.pack(">II", 60, 40), b"\xff" * 8), "AVIF image of 4,294,"),
    ],
)
def test_what_is_announced_is_bounded_in_bytes(data, message, undecoded):
    with pytest.raises(UserError, match=message):
        images.decode(data, channels=12 if b"12)" in data else 3)


def test_the_size_that_a_tiff_announces_is_bounded(undecoded):
    data = bytearray(tiff(np.zeros((8, 8, 12), "u2"), photometric="minisblack"))
    page = headers.tiff_page(bytes(data))
    for name in ("ImageWidth", "ImageLength"):
        offset = page.tags[name].valueoffset
        data[offset : offset + page.tags[name].valuebytecount] = b"\xff\x7f\0\0"[
            : page.tags[name].valuebytecount
        ]
    with pytest.raises(UserError, match="TIFF image of 32,767 x 32,767 pixels"):
        images.decode(bytes(data), channels=12)


def test_a_packed_tiff_cannot_grow_a_thousandfold(undecoded, monkeypatch):
    zeros = np.zeros((400, 400, 12), "u2")
    data = tiff(zeros, photometric="minisblack", planarconfig="contig", compression="zlib")
    monkeypatch.setattr(images, "MAX_BYTES", 1032 * 100)
    with pytest.raises(UserError, match="TIFF of packed parts of MBs"):
        images.decode(data, channels=12)


def test_what_is_left_out_is_told():
    grey = IMAGE.convert("L")
    pages = [grey, grey.rotate(180)]
    alpha = IMAGE.convert("RGBA")
    several = ["of several pages or frames, of which the first is read"]
    transparent = ["with transparency, which is dropped"]
    ten_bits = cv2.imencode(
        ".avif", np.full((32, 32, 3), 900, np.uint16), [cv2.IMWRITE_AVIF_DEPTH, 10]
    )[1].tobytes()
    for data, expected in (
        (encoded("GIF", grey), []),
        (encoded("GIF", grey, save_all=True, append_images=pages[1:]), several),
        (encoded("PNG", grey, save_all=True, append_images=pages[1:]), several),
        (encoded("WEBP", grey, save_all=True, append_images=pages[1:]), several),
        (encoded("AVIF", grey, save_all=True, append_images=pages[1:]), several),
        (encoded("TIFF", grey, save_all=True, append_images=pages[1:]), several),
        (encoded("PNG", alpha), transparent),
        (encoded("WEBP", alpha), []),  # Not if it is all opaque.
        (encoded("TIFF", alpha), transparent),
        (encoded("TIFF"), []),
        (encoded("JPEG"), []),
        (ten_bits, ["of more than 8 bits, rounded to 8"]),
    ):
        assert headers.left_out(data, headers.read_header(data)) == expected


# TIFF, arrays and the rest, decoded.


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "i2", "i4", "f8"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("packed", [None, "zlib"])
def test_a_tiff_of_any_type_and_channels_is_read_as_it_was_written(dtype, channels, planes, packed):
    values = np.random.default_rng(0).integers(0, 200, (20, 30, channels)).astype(dtype)
    for tile in (None, (16, 16)):
        data = tiff(
            np.moveaxis(values, -1, 0) if planes == "separate" else values,
            photometric="rgb" if channels in (3, 4) else "minisblack",
            planarconfig=planes if channels > 1 else None,
            compression=packed,
            tile=tile,
            **({"extrasamples": ["unspecified"]} if channels == 4 else {}),
        )
        read = images.decode(data, channels=channels)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("packed", [None, "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_a_tiff_of_8_bits_is_read_as_pil_reads_it(mode, packed):
    data = encoded("TIFF", IMAGE.convert(mode), compression=packed)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(images.decode(data).astype(int) - expected).max() <= 1


def test_a_tiff_of_lzw_and_16_bits_is_read_and_of_12_channels_refused_with_advice():
    grey = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20)
    data = encoded("TIFF", grey, compression="tiff_lzw")
    np.testing.assert_array_equal(images.decode(data, channels=1)[..., 0], np.asarray(grey))
    zeros = np.zeros((8, 8, 12), "u2")
    many = bytearray(tiff(zeros, photometric="minisblack", planarconfig="contig"))
    page = headers.tiff_page(bytes(many))
    at = page.tags["Compression"].valueoffset
    many[at : at + 2] = b"\5\0"
    with pytest.raises(UserError, match=r"packed by LZW.*imagecodecs, or write it unpacked"):
        images.decode(bytes(many), channels=page.samplesperpixel)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("packed", [None, "zlib"])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_a_part_of_a_tiff_is_damaged(kept, packed, channels):
    values = np.random.default_rng(0).integers(0, 9999, (64, 64, channels)).astype(np.uint16)
    data = tiff(
        values,
        photometric="rgb" if channels == 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        compression=packed,
        rowsperstrip=8,
    )
    with pytest.raises(UserError, match="truncated or damaged TIFF"):
        images.decode(data[: int(kept * len(data))], channels=channels)


def test_arrays_are_read_and_other_axes_refused():
    values = np.random.default_rng(0).normal(size=(20, 30, 12)).astype(np.float32)
    np.testing.assert_array_equal(images.decode(npy(values), channels=12), values)
    np.testing.assert_array_equal(
        images.decode(npy(np.asfortranarray(values)), channels=12), values
    )
    grey = images.decode(npy(values[..., 0].astype(">f8")))
    np.testing.assert_array_equal(grey, np.repeat(values[..., :1].astype("f8"), 3, axis=2))
    for wrong in (values.transpose(2, 0, 1), values[0, 0], values.astype(complex), values[:0]):
        with pytest.raises(UserError, match=r"an array of shape .*, expected numbers"):
            images.decode(npy(wrong), channels=12)
    with pytest.raises(UserError, match="truncated or damaged NumPy"):
        images.decode(npy(values)[:-9], channels=12)
    with pytest.raises(UserError, match="12 channels, expected 3 as in the other images"):
        images.decode(npy(values))


def test_avif_and_heic_are_read():
    pillow_heif = pytest.importorskip("pillow_heif")
    smooth = Image.new("RGB", (64, 48), (200, 100, 50))
    heic = io.BytesIO()
    pillow_heif.from_pillow(smooth).save(heic)
    for data in (encoded("AVIF", smooth), heic.getvalue()):
        image = images.decode(data)
        assert image.shape == (48, 64, 3)
        assert np.abs(image.astype(int) - (200, 100, 50)).max() <= 4
        with pytest.raises(UserError, match=r"truncated or damaged (AVIF|HEIC)"):
            images.decode(data[: len(data) - 20])


def test_a_heic_without_its_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    with pytest.raises(UserError, match=r"a.heic: a HEIC image; .*pip install 'vit_jax\[heic\]'"):
        images.decode(data, name="a.heic")


def test_a_camera_raw_file_is_no_image_of_its_preview():
    data = tiff(np.zeros((8, 8, 3), "u1"), photometric="rgb", subfiletype=1)
    with pytest.raises(UserError, match="camera's raw file, of which only the preview"):
        images.decode(data)


MANY = np.random.default_rng(0).integers(0, 999, (40, 60, 12)).astype(np.uint16)
WHOLE = [
    *(encoded(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")),
    encoded("JPEG", progressive=True),
    encoded("TIFF", compression="tiff_lzw"),
    tiff(MANY, photometric="minisblack", planarconfig="contig"),
    tiff(MANY, photometric="minisblack", planarconfig="contig", compression="zlib", tile=(16, 16)),
    npy(MANY),
]


@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_read_or_refused_in_one_line(data, changes):
    damaged = bytearray(data)
    for place, content in changes:
        at = int(place**3 * len(damaged))  # Mostly near the beginning.
        damaged[at : at + len(content)] = content
    try:
        header = headers.read_header(bytes(damaged))
        image = images.decode(bytes(damaged), channels=header.channels, remarks=[])
        assert image.shape[2] == header.channels
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_headers_are_read_without_opencv():
    code = "import sys; from vit_jax.data import headers; sys.exit('cv2' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
