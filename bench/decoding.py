"""``python -m bench.decoding``: images a second of one core, from JPEG files to a training batch, and what packing gains.

Every decoder that is installed is timed on the original files, ours on the same images packed as well.
"""

import statistics
import tempfile
import time
from pathlib import Path

import tyro

from bench.decoders import DECODERS, SIZE, Run
from bench.photographs import QUALITY, write_photographs
from bench.table import machine_list, verdict
from r2d2fast import machine
from r2d2fast.data import DataError
from r2d2fast.data.photographs import packing
from r2d2fast.tables import markdown_table
from r2d2fast.train.threads import cpu_threads

TARGET = 2.0
"""The project's own target: times as many images a second from the packed copy."""
OURS = "r2d2fast"


def measure(runs: dict[str, Run], images: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time an image, of all threads together, round by round and in turn."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append((time.process_time() - start) / images)
    return seconds


def prepare(folders: dict[str, Path]) -> tuple[dict[str, Run], dict[str, str]]:
    """The decoders that are installed, by name and folder, and why the others cannot run. Only ours reads packed folders."""
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for name, decoder in DECODERS.items():
        try:
            for folder in folders if name.startswith(OURS) else list(folders)[:1]:
                run = decoder.prepare(folders[folder])
                run()
                runs[f"{name} {folder}"] = run
        except (ImportError, OSError, RuntimeError, AttributeError, DataError) as error:
            absent[name] = str(error).strip().splitlines()[0][:100]
    return runs, absent


def main(*, images: int = 200, rounds: int = 15) -> None:
    """Images a second of one core, from JPEG files to a training batch, of every decoder that is installed.

    Args:
        images: Photographs to write and decode.
        rounds: Timed passes of each decoder, taken in turn.
    """
    about = machine.describe()
    with tempfile.TemporaryDirectory() as temporary, cpu_threads(1):
        folders = {"originals": Path(temporary) / "originals", "packed": Path(temporary) / "packed"}
        write_photographs(folders["originals"], images, 2)
        header = packing.pack(folders["originals"], folders["packed"])
        size = sum(path.stat().st_size for path in folders["originals"].glob("train/*/*")) / images
        runs, absent = prepare(folders)
        seconds = measure(runs, images, rounds)

    print(machine_list(about), end="\n\n")
    packed = header["parts"]["train"]
    print(
        f"{images} JPEG files of 500 x 375, 500 x 333 and upright, quality {QUALITY}, {size / 1e3:.0f} kB each; packed: "
        f"short side {header['short_side']}, quality {header['quality']}, {packed['bytes'] / packed['images'] / 1e3:.0f} kB. "
        f"File to uint8 {SIZE} x {SIZE}; images per second of processor time.",
        end="\n\n",
    )
    rows = [
        (
            DECODERS[name].description,
            folder,
            DECODERS[name].resizing,
            f"{statistics.median(samples) * 1e6:.0f}",
            f"{1 / statistics.median(samples):.0f}",
        )
        for (name, folder), samples in sorted(
            ((tuple(key.split(" ")), samples) for key, samples in seconds.items()),
            key=lambda one: statistics.median(one[1]),
        )
    ]
    rows += [
        (DECODERS[name].description, "", "does not run here: " + reason, "", "") for name, reason in absent.items()
    ]
    print(markdown_table(("decoder", "files", "resizing", "median µs", "images/s/core"), rows), end="\n\n")
    ours, theirs = (seconds[f"{OURS} {folder}"] for folder in ("packed", "originals"))
    gain = statistics.median(one / other for one, other in zip(theirs, ours, strict=True))
    print(f"Packing: {gain:.2f} times as many images a second (target {TARGET:.2f}: {verdict(gain >= TARGET)})")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.decoding", config=(tyro.conf.FlagCreatePairsOff,))
