"""Batches of photographs, decoded and resized by NVIDIA DALI on the training device (``pip install "r2d2fast[dali]"``).

Loader processes read the files and choose each one's crop, as where the CPU decodes. DALI, which gets bytes and crops, makes the
next batch while training uses this one; on a GPU with nvJPEG.

Pixels are the CPU's within 1 of 255, but for a crop's outermost ones: where the filter reaches beyond what was cut, DALI repeats
the border, and PyTorch goes without.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from r2d2fast.data.errors import DataError
from r2d2fast.data.order import Batch
from r2d2fast.data.photographs.crop import Crop
from r2d2fast.data.photographs.decode import BadImageError, jpeg_header
from r2d2fast.data.photographs.workers import load_batches

if TYPE_CHECKING:
    from r2d2fast.data.photographs.images import Load

# The end of a JPEG file, after which some cameras and servers write a few bytes more.
_END_MARKER = b"\xff\xd9"
_AFTER_END = 64


class _Encoded(NamedTuple):
    """A batch on its way to DALI.

    Attributes:
        data: uint8, the JPEG files for DALI, one after another.
        ends: int64 ``[J]``, where each ends.
        crops: int32 ``[J, 10]``, a :class:`Crop` each.
        others: uint8 ``[B - J, 3, size, size]``, the crops that the loader made itself.
        order: int64 ``[B]``, for each image of the batch its number among those of DALI and the others.
        failures: what went wrong.
    """

    data: Tensor
    ends: Tensor
    crops: Tensor
    others: Tensor
    order: Tensor
    failures: list[Exception]


@dataclass(frozen=True)
class _Read:
    """What loader processes do.

    A file that is no ordinary JPEG, or is cut off, is decoded here, which DALI may not do the same way, or not notice.
    """

    load: "Load"

    def __call__(self, batch: Batch) -> _Encoded:
        load = self.load
        files: list[np.ndarray] = []
        crops: list[Crop] = []
        places: list[int] = []
        others = load.empty(len(batch.samples))
        failures: list[Exception] = []
        for place, (sample, numbers) in enumerate(zip(batch.samples.tolist(), load.numbers(batch), strict=True)):
            try:
                data = load.files.read(sample)
                shape = _shape_for_dali(data)
                if shape is None:
                    load.write_crop(others[place], data, sample, numbers)
                else:
                    files.append(np.frombuffer(data, np.uint8))
                    crops.append(load.crop(*shape, numbers))
                    places.append(place)
            except (BadImageError, OSError) as error:
                failures.append(error)
        rest = sorted(set(range(len(batch.samples))).difference(places))
        return _Encoded(
            torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *files])),
            torch.tensor([len(file) for file in files], dtype=torch.int64).cumsum(0),
            torch.tensor(crops, dtype=torch.int32).view(-1, len(Crop._fields)),
            others[rest],
            torch.tensor(places + rest).argsort(),
            failures,
        )


def _shape_for_dali(data: bytes | memoryview) -> tuple[int, int] | None:
    """Height and width of a JPEG file that DALI can be given; None for another."""
    header = jpeg_header(data)
    if header is None or header[2] not in ("YCbCr", "Gray") or _END_MARKER not in bytes(data[-_AFTER_END:]):
        return None
    return header[:2]


class _Pipeline:
    """DALI's pipeline: given a batch it works in the background, until the result is taken.

    Args:
        largest: most files in a batch.
        device: where the crops are wanted; on a GPU that is where they are decoded.
        threads: that DALI has on the CPU.
    """

    def __init__(self, largest: int, device: torch.device, threads: int) -> None:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import feed_ndarray

        on_gpu = device.type == "cuda"
        self._device = device
        self._copy = feed_ndarray
        ordinal = torch.cuda.current_device() if on_gpu and device.index is None else device.index

        @pipeline_def(
            batch_size=largest,
            num_threads=threads,
            device_id=ordinal if on_gpu else None,
            # Results on the stream that uses them, in memory of their own.
            exec_dynamic=True,
            # More would have it ask for the next batch before it gives this one.
            prefetch_queue_depth=1,
        )
        def pipeline() -> Any:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            crops = fn.external_source(name="crops", dtype=types.INT32, ndim=1)
            # As libjpeg-turbo does by default: chroma interpolated, orientation left alone. Only the part that is cut is decoded.
            part = fn.decoders.image_slice(
                files,
                device="mixed" if on_gpu else "cpu",
                start=crops[0:2],
                shape=crops[2:4],
                axis_names="HW",
                jpeg_fancy_upsampling=True,
                adjust_orientation=False,
            )
            image = fn.resize(
                part, size=fn.cast(crops[4:6], dtype=types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True
            )
            crop = fn.slice(image, start=crops[6:8], shape=fn.stack(crops[8], crops[8]), axis_names="HW")
            return fn.flip(crop, horizontal=crops[9])

        self._pipeline = pipeline()
        self._pipeline.build()

    def give(self, encoded: _Encoded) -> None:
        files = [file.numpy() for file in encoded.data.tensor_split(encoded.ends[:-1])]
        self._pipeline.feed_input("files", files)
        self._pipeline.feed_input("crops", encoded.crops.numpy())
        self._pipeline.schedule_run()

    def take(self) -> Tensor:
        """The crops: uint8 ``[J, 3, size, size]``, channels last."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (batch,) = self._pipeline.outputs(stream)
        crops = batch.as_tensor()
        # Not by DLPack: when PyTorch lets go of DALI's memory, a thread of DALI's waits for the whole device, which a stream that
        # records a CUDA graph does not stand (by its source; no GPU here to see it).
        copy = torch.empty(crops.shape(), dtype=torch.uint8, device=self._device)
        self._copy(crops, copy, cuda_stream=stream)
        return copy.permute(0, 3, 1, 2)


class _Decoder:
    """Decodes batches, each in the background while the one before is used."""

    def __init__(self, load: "Load", largest: int, device: torch.device) -> None:
        self._load = load
        self._new_pipeline = partial(_Pipeline, largest, device, max(1, load.options.workers))
        self._device = device
        self._pipeline: _Pipeline | None = None
        self._begun: tuple[Batch, _Encoded] | None = None

    def begin(self, batch: Batch, encoded: _Encoded) -> None:
        """Begin with a batch, of which the loader has made ``encoded``. The one before has been finished."""
        self._begun = batch, encoded
        if len(encoded.ends):
            try:
                self._pipeline = self._pipeline or self._new_pipeline()
                self._pipeline.give(encoded)
            except Exception as error:
                raise DataError(
                    f"--decoder dali: DALI cannot work here; --decoder cpu does without it. {error}"
                ) from error

    def finish(self) -> tuple[Tensor, list[Exception]] | None:
        """The batch that was begun; None if none was."""
        if self._begun is None:
            return None
        (batch, encoded), self._begun = self._begun, None
        images = encoded.others.to(self._device)
        if self._pipeline is not None and len(encoded.ends):
            try:
                crops = self._pipeline.take()
            # Of several types; what DALI says of all of them is that the pipeline is no longer valid.
            except Exception as error:
                self._pipeline = None
                return self._by_cpu(batch, error)
            images = torch.cat([crops, images])[encoded.order.to(self._device)] if len(images) else crops
        return images, encoded.failures

    def _by_cpu(self, batch: Batch, error: Exception) -> tuple[Tensor, list[Exception]]:
        images, failures = self._load(batch)
        if not failures:
            raise DataError(
                f"DALI failed at images that the CPU can decode; --resume --decoder cpu goes on without it. {error}"
            ) from error
        return images.to(self._device), failures


def require_dali() -> None:
    """Raises DataError, with what to do, where DALI is not installed or does not load."""
    try:
        import nvidia.dali  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError(
            f'--decoder dali: {error.name} is not installed; pip install "r2d2fast[dali]", or --decoder cpu'
        ) from error
    except (ImportError, OSError) as error:
        raise DataError(
            f"--decoder dali: NVIDIA DALI is installed, but does not load ({error}); --decoder cpu"
        ) from error


def dali_batches(
    load: "Load", order: Sequence[Batch], device: torch.device
) -> Iterator[tuple[Tensor, list[Exception]]]:
    """Each batch of ``order``: its images, uint8 ``[B, 3, size, size]``, channels last, on ``device``, and what went wrong.

    A file that DALI cannot decode ends its pipeline. Its batch is then decoded by the CPU, which knows what is wrong with which
    file. Damage within a file that DALI shows all the same goes unnoticed; packing finds it.

    Raises DataError if DALI cannot work, or fails at a batch that the CPU can decode.
    """
    decoder = _Decoder(load, max((len(batch.samples) for batch in order), default=1), device)
    for batch, encoded in zip(order, load_batches(_Read(load), order, load.options.workers), strict=True):
        done = decoder.finish()
        decoder.begin(batch, encoded)
        if done is not None:
            yield done
    done = decoder.finish()
    if done is not None:
        yield done
