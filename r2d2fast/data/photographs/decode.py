"""The bytes of an image file as RGB pixels."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from r2d2fast.data.errors import DataError

# libjpeg-turbo's words for an entropy-coded part that is cut off or does not decode. Its other warnings (bytes too many before a
# marker, odd scan parameters) are about files that show well, and Pillow decides.
_DAMAGE = ("premature end of", "bad huffman code")
_JPEG_START = b"\xff\xd8"


class BadImageError(DataError):
    """An image file is damaged, or of no kind that can be decoded.

    Args:
        name: of the file, as the data set has it.
        reason: what the decoder says.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.reason}. Mend or remove the file, or let --on-bad-image skip (in Python: "
            'on_bad_image="skip") go on without such images'
        )


def is_jpeg(data: bytes | memoryview) -> bool:
    """Whether a file begins as JPEG files do."""
    return bytes(data[:2]) == _JPEG_START


def jpeg_header(data: bytes | memoryview) -> tuple[int, int, str] | None:
    """Height, width and colours ("YCbCr", "RGB", "Gray", …) of a JPEG file.

    None for a file of another kind, a damaged header, or more pixels than Pillow allows.
    """
    if not is_jpeg(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width, colours) if height * width <= 2 * (Image.MAX_IMAGE_PIXELS or np.inf) else None


def image_header(data: bytes | memoryview) -> tuple[int, int, bool] | None:
    """Height, width and whether an image file is grey, from its header alone; None where there is none that can be read."""
    header = jpeg_header(data)
    if header is not None:
        return header[0], header[1], header[2] == "Gray"
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width, image.mode in ("1", "L", "LA") or image.mode.startswith("I;16")
    except Exception:  # see decode()
        return None


def decode(data: bytes | memoryview, name: str) -> np.ndarray:
    """Pixels of an image file in full size: uint8 ``[H, W, 3]``, RGB.

    JPEG files with grey or RGB content go to simplejpeg, whose pixels are bit by bit those of Pillow, sooner. Pillow converts the
    others: CMYK, palettes; an alpha channel is dropped, of 16 bits the upper 8 are kept, of an animation the first frame. The
    orientation that EXIF data may ask for is ignored, as by torchvision's ``ImageFolder`` and so in ImageNet figures.

    Raises BadImageError, with ``name``, if the file is empty, cut off, damaged, not an image, or claims more pixels than Pillow
    allows (``Image.MAX_IMAGE_PIXELS``, twice).
    """
    header = jpeg_header(data)
    if header is not None and header[2] in ("YCbCr", "RGB", "Gray"):
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError as error:
            if any(words in str(error).lower() for words in _DAMAGE):
                raise BadImageError(name, f"damaged JPEG file ({error})") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I;16"):
                # Pillow's own conversion to 8 bits makes everything above 255 white.
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise BadImageError(name, f"pixels of mode {image.mode}, whose range is unknown; convert it to 8 bits")
            return np.array(image.convert("RGB"))
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        # On damaged bytes Pillow's readers raise whatever they stumble over: OSError, SyntaxError, struct.error, IndexError …
        # Pillow's own text of this one has the address of a Python object in it.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no format that Pillow knows" if unknown else error or type(error).__name__
        raise BadImageError(name, f"not a readable image ({reason})") from error
