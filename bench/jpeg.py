"""``python -m bench.jpeg``: what a decoder of JPEG files costs against simplejpeg, at photographs' sizes, in full and scaled.

Scaled down: by the decoder's own DCT scaling, as far as both sides keep at least 224 pixels; simplejpeg has all eighths, Pillow
halves, quarters and eighths.
"""

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
import tyro
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode, decode_jpeg

from bench.table import machine_list
from r2d2fast import machine
from r2d2fast.tables import markdown_table
from r2d2fast.train.threads import cpu_threads

SIZES = ((500, 375), (640, 427), (1600, 1067), (4000, 2668))
SMALLEST = 224
QUALITY = 95

Decode = Callable[[bytes], np.ndarray]


def _pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def _pillow_scaled(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (SMALLEST, SMALLEST))
        return np.array(image.convert("RGB"))


def _torchvision(data: bytes) -> np.ndarray:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _scaled(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", min_height=SMALLEST, min_width=SMALLEST, min_factor=1)


DECODERS: dict[str, dict[str, Decode]] = {
    "in full": {"simplejpeg": simplejpeg.decode_jpeg, "torchvision": _torchvision, "Pillow": _pillow},
    "scaled": {"simplejpeg": _scaled, "Pillow": _pillow_scaled},  # torchvision has no scaling
}


def photographs(width: int, height: int) -> list[bytes]:
    """JPEG files of scikit-learn's two photographs, resized."""
    files = []
    for pixels in load_sample_images().images:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(file, "jpeg", quality=QUALITY)
        files.append(file.getvalue())
    return files


def main(*, rounds: int = 15) -> None:
    """Processor time of JPEG decoders against simplejpeg's.

    Args:
        rounds: Timed passes of each decoder, taken in turn.
    """
    about, rows = machine.describe(), []
    with cpu_threads(1):
        for width, height in SIZES:
            files = photographs(width, height)
            for kind, decoders in DECODERS.items():
                seconds: dict[str, list[float]] = {name: [] for name in decoders}
                for _ in range(rounds):
                    for name, decode in decoders.items():
                        start = time.process_time()
                        for data in files:
                            decode(data)
                        seconds[name].append((time.process_time() - start) / len(files))
                own = seconds["simplejpeg"]
                for name, samples in seconds.items():
                    ratio = statistics.median(one / base for one, base in zip(samples, own, strict=True))
                    same = all(np.array_equal(decoders[name](data), decoders["simplejpeg"](data)) for data in files)
                    median = f"{statistics.median(samples) * 1e3:.2f}"
                    rows.append((f"{width} x {height}", kind, name, median, f"{ratio:.2f}", "yes" if same else "no"))
    print(machine_list(about), end="\n\n")
    print(markdown_table(("pixels", "decoded", "decoder", "median ms", "times simplejpeg's", "same pixels"), rows))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.jpeg", config=(tyro.conf.FlagCreatePairsOff,))
