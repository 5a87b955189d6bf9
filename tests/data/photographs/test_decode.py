"""Every kind of image file becomes RGB pixels, or an error that names it."""

import pickle

import numpy as np
import pytest
from PIL import Image

from r2d2fast.data.photographs.decode import BadImageError, decode
from tests.data.small_photographs import encoded, piece, pixels

PHOTOGRAPH = piece(0)


def with_exif_rotation() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PHOTOGRAPH, exif=exif)


GOOD = {
    "4:2:0": encoded(PHOTOGRAPH, subsampling=2),
    "4:4:4": encoded(PHOTOGRAPH, subsampling=0),
    "progressive": encoded(PHOTOGRAPH, progressive=True),
    "stored as RGB": encoded(PHOTOGRAPH, keep_rgb=True),
    "grey": encoded(PHOTOGRAPH.convert("L")),
    "CMYK": encoded(PHOTOGRAPH.convert("CMYK")),
    "1 x 300": encoded(PHOTOGRAPH.resize((1, 300))),
    "300 x 1": encoded(PHOTOGRAPH.resize((300, 1))),
    "1 x 1": encoded(PHOTOGRAPH.resize((1, 1))),
    "EXIF orientation": with_exif_rotation(),
    "bytes after the end": encoded(PHOTOGRAPH) + b"trailing",
    "bytes before the end": encoded(PHOTOGRAPH)[:-2] + b"\x12\x34\xff\xd9",
    "PNG": encoded(PHOTOGRAPH, "PNG"),
    "palette": encoded(PHOTOGRAPH.convert("P"), "PNG"),
    "palette with transparency": encoded(PHOTOGRAPH.convert("P"), "PNG", transparency=3),
    "alpha": encoded(PHOTOGRAPH.convert("RGBA"), "PNG"),
    "grey and alpha": encoded(PHOTOGRAPH.convert("LA"), "PNG"),
    "black and white": encoded(PHOTOGRAPH.convert("1"), "PNG"),
    "WebP": encoded(PHOTOGRAPH, "WEBP", lossless=True),
    "animation": encoded(PHOTOGRAPH, "GIF", save_all=True, append_images=[piece(1)]),
}


@pytest.mark.parametrize("kind", GOOD)
def test_pixels_are_those_of_pillow_bit_by_bit(kind):
    decoded = decode(GOOD[kind], "x.jpg")
    assert (decoded.dtype, decoded.shape[2]) == (np.uint8, 3)
    np.testing.assert_array_equal(decoded, pixels(GOOD[kind]))
    np.testing.assert_array_equal(decode(memoryview(GOOD[kind]), "x.jpg"), decoded)


def test_exif_orientation_is_ignored():
    np.testing.assert_array_equal(decode(with_exif_rotation(), "x"), decode(encoded(PHOTOGRAPH), "x"))


def test_16_bits_keep_their_upper_half():
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    decoded = decode(encoded(Image.fromarray(grey), "PNG"), "x.png")
    np.testing.assert_array_equal(decoded, np.repeat((grey // 256).astype(np.uint8)[:, :, None], 3, axis=2))


def cut_off(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def a_piece_missing() -> bytes:
    data = encoded(PHOTOGRAPH)
    return data[: len(data) // 2] + data[len(data) // 2 + 400 :]


def of_size_65500() -> bytes:
    data = bytearray(encoded(PHOTOGRAPH))
    frame = data.find(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    return bytes(data)


BAD = {
    "empty": b"",
    "JPEG marker only": b"\xff\xd8",
    "JPEG header only": encoded(PHOTOGRAPH)[:100],
    "half a JPEG file": cut_off(encoded(PHOTOGRAPH), 0.5),
    "almost all of a JPEG file": encoded(PHOTOGRAPH)[:-40],
    "half a grey JPEG file": cut_off(encoded(PHOTOGRAPH.convert("L")), 0.5),
    "half a CMYK file": cut_off(encoded(PHOTOGRAPH.convert("CMYK")), 0.5),
    "a piece missing": a_piece_missing(),
    "claims 65500 x 65500 pixels": of_size_65500(),
    "half a PNG file": cut_off(encoded(PHOTOGRAPH, "PNG"), 0.5),
    "PNG header only": encoded(PHOTOGRAPH, "PNG")[:20],
    "half a GIF file": cut_off(encoded(PHOTOGRAPH, "GIF"), 0.3),
    "half a WebP file": cut_off(encoded(PHOTOGRAPH, "WEBP"), 0.5),
    "text": b"<html>404 Not Found</html>",
    "floating-point pixels": encoded(Image.new("F", (4, 4)), "TIFF"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named(kind):
    with pytest.raises(
        BadImageError, match=r"^n01/odd name\.JPEG: .+\. Mend or remove .*--on-bad-image skip"
    ) as caught:
        decode(BAD[kind], "n01/odd name.JPEG")
    assert caught.value.name == "n01/odd name.JPEG"
    # It comes from a loader process.
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (BadImageError, str(caught.value))


@pytest.mark.parametrize("seed", range(40))
def test_arbitrary_damage_gives_pixels_or_this_error(seed):
    rng = np.random.default_rng(seed)
    data = np.frombuffer(GOOD[list(GOOD)[seed % len(GOOD)]], np.uint8).copy()
    data[rng.integers(0, len(data), 20)] = rng.integers(0, 256, 20)
    try:
        decoded = decode(data.tobytes(), "x")
    except BadImageError:
        return
    assert decoded.ndim == 3
