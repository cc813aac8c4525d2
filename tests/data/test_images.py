"""decode_image: everything becomes uint8 (height, width, 3), or a DataError that names it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from polytask.data.images import MAX_PIXELS, check_image, decode_image
from polytask.errors import DataError

COLOUR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = COLOUR[:, :, 0]


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def repeated(grey):
    return np.repeat(grey[:, :, None], 3, axis=2)


def over_white(colour, alpha):
    share = alpha[:, :, None].astype(np.float64) / 255
    return colour * share + 255 * (1 - share)


def test_arrays_bytes_paths_and_pictures_give_the_same_pixels(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(COLOUR)))
    data = path.read_bytes()
    forms = (
        COLOUR, path, str(path), data, bytearray(data), Image.fromarray(COLOUR),
        {"bytes": data, "path": None}, {"bytes": None, "path": str(path)},
        COLOUR.tolist(), COLOUR / 255, COLOUR.astype(np.int64), COLOUR.astype(np.uint16) * 257,
    )  # fmt: skip
    for form in forms:
        pixels = decode_image(form)
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, COLOUR)


def test_grey_is_repeated_over_three_channels():
    for form in (GREY, GREY[:, :, None], encoded(Image.fromarray(GREY))):
        np.testing.assert_array_equal(decode_image(form), repeated(GREY))
    bits = GREY > 100
    for form in (bits, encoded(Image.fromarray(bits))):
        np.testing.assert_array_equal(decode_image(form), repeated(bits.astype(np.uint8) * 255))


def test_transparency_lies_over_white():
    alpha = COLOUR[:, :, 1]
    four, two = np.dstack([COLOUR, alpha]), np.dstack([GREY, alpha])
    expected, grey = over_white(COLOUR, alpha), over_white(repeated(GREY), alpha)
    for form in (four, encoded(Image.fromarray(four))):
        np.testing.assert_allclose(decode_image(form), expected, atol=1)
    for form in (two, encoded(Image.fromarray(two, "LA"))):
        np.testing.assert_allclose(decode_image(form), grey, atol=1)


def test_a_palette_gives_its_colours_and_its_transparent_entry_white():
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    np.testing.assert_array_equal(decode_image(encoded(picture)), colours)
    colours[0][1] = [255, 255, 255]
    np.testing.assert_array_equal(decode_image(encoded(picture, transparency=1)), colours)


def test_sixteen_bits_are_scaled_to_eight():
    deep = GREY.astype(np.uint16) * 257
    for form in (deep, encoded(Image.fromarray(deep)), encoded(Image.fromarray(deep), "TIFF")):
        np.testing.assert_array_equal(decode_image(form), repeated(GREY))


def test_a_photograph_is_turned_as_its_orientation_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    data = encoded(Image.fromarray(COLOUR), exif=exif)
    np.testing.assert_array_equal(decode_image(data), np.rot90(COLOUR, -1))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data), np.full((4, 4, 3), 10))


def test_jpeg_in_other_colour_spaces_is_rgb():
    data = encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=100)
    assert decode_image(data).shape == COLOUR.shape


def bomb() -> bytes:
    """A small PNG that says it has 30,000 x 30,000 pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    with pytest.raises(
        DataError, match=r"row 3: image .*bomb\.png has more than 100 million pixels"
    ):
        decode_image(path, "row 3")
    assert MAX_PIXELS < 30_000 * 30_000
    monkeypatch.setattr("polytask.data.images.MAX_PIXELS", 30)
    with pytest.raises(DataError, match="million pixels"):
        decode_image(encoded(Image.fromarray(COLOUR)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_a_cut_off_file_is_named(tmp_path, form):
    big = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / f"half.{form.lower()}"
    path.write_bytes(encoded(Image.fromarray(big), form))
    assert check_image(path) is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"line 7: image .*half\.\w+ cannot be decoded"):
        decode_image(path, "line 7")
    assert "cannot be decoded" in check_image(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"not an image", "cannot be decoded"),
        ("/nowhere/x.png", r"/nowhere/x\.png is missing"),
        ("http://example.org/x.png", "is an address; download it first"),
        (None, "there is no image"),
        ("", "there is no image"),
        (b"", "there is no image"),
        (3.5, "is a float, not an image"),
        (np.zeros((2, 2, 5)), r"not \(2, 2, 5\)"),
        (np.zeros((0, 4)), r"not \(0, 4, 1\)"),
        (np.zeros(7), r"not \(7,\)"),
        (np.full((2, 2), 300), "not int64 from 300 to 300"),
        (np.full((2, 2), -0.5), "not float64 from -0.5"),
        (np.full((2, 2), np.nan), "not float64 from nan"),
        (np.full((2, 2), "x"), "image values should be"),
        ([[1, 2], [3]], "rows differ in length"),
    ],
)
def test_what_is_no_image_is_named(value, message):
    with pytest.raises(DataError, match=r"here: .*" + message):
        decode_image(value, "here")


def test_random_bytes_never_raise_anything_else():
    random = np.random.default_rng(2)
    whole = encoded(Image.fromarray(COLOUR))
    for _ in range(300):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 4):
            data[place] = random.integers(0, 256)
        try:
            pixels = decode_image(bytes(data))
        except DataError:
            continue
        assert pixels.dtype == np.uint8 and pixels.ndim == 3
