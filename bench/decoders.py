"""Decoders of JPEG files that make a training batch: RandomResizedCrop 224 and flip, uint8, on one thread.

All of them wrap libjpeg-turbo or FFmpeg; they differ in the wrapping and in how the crop is resized.
"""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from r2d2fast.data.dataset import Augmentation, Images
from r2d2fast.data.folder import load_folder
from r2d2fast.data.order import Batch
from r2d2fast.data.photographs.crop import RANDOM_NUMBERS, random_rectangle
from r2d2fast.data.photographs.dali import dali_batches
from r2d2fast.data.photographs.options import PhotographOptions

SIZE = 224
AUGMENTATION = Augmentation(flip=True)
ANTIALIASED = "antialiased bilinear"

# Makes a batch of all training images of a folder.
Run = Callable[[], Any]
# Makes one image: from the bytes of a file, uint8 [3, 224, 224].
Crop = Callable[[bytes], Tensor]


class Decoder(NamedTuple):
    description: str
    resizing: str
    prepare: Callable[[Path], Run]
    """Given the folder of images. ImportError, OSError or RuntimeError where the decoder is not installed."""


def _each(make: Callable[[], Crop]) -> Callable[[Path], Run]:
    def prepare(root: Path) -> Run:
        view = make()
        paths = sorted(root.glob("train/*/*"))
        return lambda: torch.stack([view(path.read_bytes()) for path in paths])

    return prepare


def _then_torchvision(decode: Callable[[bytes], Tensor]) -> Crop:
    transform = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    return lambda data: transform(decode(data))


def _crop(width: int, height: int) -> tuple[int, int, int, int, bool]:
    """Left, top, width and height of a crop, and whether to mirror it, for those who take no torchvision transform."""
    numbers = [random.random() for _ in range(RANDOM_NUMBERS)]
    top, left, h, w = random_rectangle(height, width, numbers)
    return left, top, w, h, numbers[-1] < 0.5


def _of_numpy(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _of_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _pillow() -> Crop:
    transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def _pillow_draft() -> Crop:
    def view(data: bytes) -> Tensor:
        image = Image.open(io.BytesIO(data))
        full = image.size
        left, top, width, height, flip = _crop(*full)
        # The smallest of 1/1, 1/2, 1/4 and 1/8 in which the crop still has 224 x 224 pixels.
        image.draft("RGB", (full[0] * SIZE // width, full[1] * SIZE // height))
        across, down = image.width / full[0], image.height / full[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        return _of_numpy(np.array(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized))

    return view


def _torchvision() -> Crop:
    from torchvision.io import decode_jpeg

    return _then_torchvision(lambda data: decode_jpeg(_of_bytes(data)))


def _torchcodec() -> Crop:
    from torchcodec.decoders import decode_jpeg

    return _then_torchvision(lambda data: decode_jpeg(_of_bytes(data)))


def _simplejpeg() -> Crop:
    import simplejpeg

    return _then_torchvision(lambda data: _of_numpy(simplejpeg.decode_jpeg(data)))


def _turbojpeg() -> Crop:
    from turbojpeg import TJPF_RGB, TurboJPEG

    library = TurboJPEG()
    return _then_torchvision(lambda data: _of_numpy(library.decode(data, pixel_format=TJPF_RGB)))


def _imagecodecs() -> Crop:
    import imagecodecs

    return _then_torchvision(lambda data: _of_numpy(imagecodecs.jpeg8_decode(data)))


def _opencv(reduced: bool) -> Crop:
    import cv2

    cv2.setNumThreads(1)
    mode = cv2.IMREAD_REDUCED_COLOR_2 if reduced else cv2.IMREAD_COLOR

    def view(data: bytes) -> Tensor:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
        left, top, width, height, flip = _crop(pixels.shape[1], pixels.shape[0])
        crop = cv2.resize(pixels[top : top + height, left : left + width], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        return _of_numpy(cv2.cvtColor(cv2.flip(crop, 1) if flip else crop, cv2.COLOR_BGR2RGB))

    return view


def _spdl() -> Crop:
    import spdl.io

    def view(data: bytes) -> Tensor:
        packets = spdl.io.demux_image(data)
        left, top, width, height, flip = _crop(packets.codec.width, packets.codec.height)
        mirror = "hflip," if flip else ""
        frames = spdl.io.decode_packets(
            packets,
            filter_desc=f"crop={width}:{height}:{left}:{top}:exact=1,scale={SIZE}:{SIZE}:flags=bilinear,{mirror}"
            "format=pix_fmts=rgb24",
        )
        return spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(2, 0, 1)

    return view


def _dali(root: Path) -> Run:
    from nvidia.dali import fn, pipeline_def, types

    paths = sorted(map(str, root.glob("train/*/*")))

    @pipeline_def(batch_size=len(paths), num_threads=1, device_id=None, exec_async=False, exec_pipelined=False)
    def pipeline() -> Any:
        encoded, _ = fn.readers.file(files=paths)
        # This decodes only the crop.
        crop = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
        )
        resized = fn.resize(crop, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(resized, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()
    return built.run


def _ours(root: Path) -> Run:
    images: Any = load_folder(root, torch.device("cpu")).train
    batch = _every_image(images)
    # The conversion to float32 is left out, because the training device does it.
    load = images.loading(AUGMENTATION, 0)
    return lambda: load(batch)


def _every_image(images: Images) -> Batch:
    numbers = torch.arange(len(images))
    return Batch(numbers, numbers, len(numbers))


def _ours_by_dali(root: Path) -> Run:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images: Any = load_folder(root, device, PhotographOptions(decoder="dali")).train
    batch = _every_image(images)
    load = images.loading(AUGMENTATION, 0)
    return lambda: [shown.cpu() for shown, _ in dali_batches(load, [batch], device)]


DECODERS = {
    "r2d2fast": Decoder("r2d2fast", ANTIALIASED, _ours),
    "r2d2fast-dali": Decoder(
        "r2d2fast, --decoder dali" + (" (GPU)" if torch.cuda.is_available() else " (CPU)"),
        "triangular, antialiased",
        _ours_by_dali,
    ),
    "pillow": Decoder("Pillow, torchvision v2 on images", ANTIALIASED, _each(_pillow)),
    "draft": Decoder("Pillow with draft mode", "scaled DCT where it fits, then " + ANTIALIASED, _each(_pillow_draft)),
    "torchvision": Decoder("torchvision.io, v2 on tensors", ANTIALIASED, _each(_torchvision)),
    "torchcodec": Decoder("torchcodec, v2 on tensors", ANTIALIASED, _each(_torchcodec)),
    "simplejpeg": Decoder("simplejpeg, v2 on tensors", ANTIALIASED, _each(_simplejpeg)),
    "turbojpeg": Decoder("PyTurboJPEG, v2 on tensors", ANTIALIASED, _each(_turbojpeg)),
    "imagecodecs": Decoder("imagecodecs, v2 on tensors", ANTIALIASED, _each(_imagecodecs)),
    "opencv": Decoder("OpenCV", "bilinear, not antialiased", _each(lambda: _opencv(reduced=False))),
    "opencv_half": Decoder(
        "OpenCV, IMREAD_REDUCED_COLOR_2", "half the resolution, bilinear", _each(lambda: _opencv(reduced=True))
    ),
    "spdl": Decoder("spdl (FFmpeg)", "FFmpeg's bilinear, in YUV", _each(_spdl)),
    "dali": Decoder("DALI, CPU pipeline", "triangular, antialiased; only the crop decoded", _dali),
}
