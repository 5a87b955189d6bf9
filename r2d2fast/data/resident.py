"""Small images held on the training device as bytes; their augmentation is a few tensor operations a batch."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import RandAugment

from r2d2fast.data.dataset import Augmentation
from r2d2fast.data.order import Batch, keys_of
from r2d2fast.data.preprocessing import Preprocessing
from r2d2fast.data.random_numbers import derive_seed, uniform

BORDERS = ("background", "reflect")
_RANDAUGMENT = RandAugment()
_AT_ONCE = 2**19
"""Bytes of the batches that are made together. The share of the digits' D2 step that is not the network's is 14.4 % with one at a
time, 11.0, 10.6, 10.2 and 10.1 with 2¹⁷, 2¹⁸, 2¹⁹ and 2²⁰ bytes (processor time, AMD EPYC, one thread)."""


def channel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all pixels of all images.

    Args:
        pixels: uint8 ``[M, C, H, W]``.

    Returns:
        Two float32 ``[C]``, computed in float64 from a histogram. The deviation of a channel that has one value everywhere is
        given as 1, so that it is normalised to 0.
    """
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64, device=pixels.device)
    total = counts.sum(1)
    mean = counts @ values / total
    squares = (counts * (values - mean[:, None]).square()).sum(1)
    std = (squares / (total - 1)).sqrt()
    return mean.float(), torch.where(squares > 0, std, 1.0).float()


class ResidentImages:
    """One part of a data set, all of it on the training device (``Images``). No worker processes, and no batch waits for a GPU.

    An image is shifted, mirrored, normalised and cut out in that order, with five random numbers of its own (``uniform``):
    its shift down and right, mirrored if below ½, row and column of the cutout's centre. A square of even side s reaches from s/2
    before its centre to s/2 − 1 after it. Background is pixel value 0.

    Args:
        pixels: uint8 ``[M, C, H, W]``; fastest to take over if channels last.
        mean, std: float32 ``[C]`` in units of pixel values, of the training images; batches hold (pixel − mean) · (1 / std).
        device: where the images are kept and the batches made.
        bad_images: why, by name, of the images that were damaged and have been replaced in ``pixels``.
    """

    def __init__(
        self,
        pixels: Tensor,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        bad_images: dict[str, str] | None = None,
    ) -> None:
        samples, channels, height, width = pixels.shape
        self.shape = (channels, height, width)
        self.bad_images = bad_images or {}
        self._samples = samples
        # One row of an image is the unit of copying: [M · H, W · C], so that a shift down is a choice of rows.
        channels_last = pixels.permute(0, 2, 3, 1).contiguous()
        self._rows = channels_last.to(device).view(samples * height, width * channels)
        self._normalise_by(mean, std)

    def to(self, device: torch.device) -> "ResidentImages":
        """The same images, kept on ``device``."""
        moved = copy.copy(self)
        moved._rows, moved._mean, moved._scale = (one.to(device) for one in (self._rows, self._mean, self._scale))
        moved._maps = {}
        return moved

    def normalised_by(self, mean: Tensor, std: Tensor) -> "ResidentImages":
        """The same images, with another ``mean`` and ``std``, as of the class."""
        other = copy.copy(self)
        other._normalise_by(mean, std)
        return other

    def _normalise_by(self, mean: Tensor, std: Tensor) -> None:
        width, device = self.shape[2], self._rows.device
        self.preprocessing = Preprocessing("small images", self.shape, tuple(mean.tolist()), tuple(std.tolist()))
        self._mean, self._scale = mean.to(device).repeat(width), (1 / std).to(device).repeat(width)
        self._maps: dict[Augmentation, _Maps] = {}

    def __len__(self) -> int:
        return self._samples

    @property
    def nbytes(self) -> int:
        """Memory of the images on the device."""
        return self._rows.nbytes

    def batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        """See ``Images.batches``. Raises ValueError for an augmentation that these images cannot have."""
        if augmentation is not None:
            self._check(augmentation)
        return self._batches(order, augmentation, seed) if len(order) else iter(())

    def on_device(self, augmentation: Augmentation, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The same batches as a function of their samples and keys, both int64 ``[B]`` on the device, made by operations of the
        device alone, which a CUDA graph can hold. Not with RandAugment, whose choices the host makes."""
        self._check(augmentation)
        maps = self._maps_of(augmentation)
        return lambda samples, keys: self._augmented(samples, maps.choose(uniform(seed, keys, 5)), maps, None)

    def _check(self, augmentation: Augmentation) -> None:
        _, height, width = self.shape
        if augmentation.border not in BORDERS:
            raise ValueError(f"border is {augmentation.border!r}; accepted: {', '.join(BORDERS)}")
        if augmentation.cutout < 0:
            raise ValueError(
                f"cutout is {augmentation.cutout}; accepted: 0 for none, or the side of a square in pixels"
            )
        # A mirror at the border pixel shows all of the image but that pixel.
        largest = min(height, width) - (augmentation.border == "reflect")
        if not 0 <= augmentation.translate <= largest:
            raise ValueError(
                f"translate is {augmentation.translate}; accepted for images of {height} x {width} pixels and border "
                f"{augmentation.border!r}: 0 to {largest}"
            )

    def _batches(self, order: Sequence[Batch], augmentation: Augmentation | None, seed: int) -> Iterator[Tensor]:
        # Once for the whole order: a batch of small images costs little more than the number of its tensor operations.
        index = self._send(torch.cat([batch.samples for batch in order]))
        if augmentation is None:
            for samples in index.split([len(batch.samples) for batch in order]):
                yield self._evaluation(samples)
            return
        maps = self._maps_of(augmentation)
        keys = torch.cat([keys_of(batch) for batch in order])
        choices = maps.choose(uniform(seed, self._send(keys), 5))
        done = 0
        for sizes in self._together(order):
            part = slice(done, done := done + sum(sizes))
            seeds = [derive_seed(seed, key) for key in keys[part].tolist()] if augmentation.randaugment else None
            yield from self._augmented(index[part], choices[:, part], maps, seeds).split(sizes)

    def _maps_of(self, augmentation: Augmentation) -> "_Maps":
        """Made once: it takes a fifth of the time of an epoch of two steps."""
        if augmentation not in self._maps:
            self._maps[augmentation] = _Maps.make(self.shape, augmentation, self._scale)
        return self._maps[augmentation]

    def _together(self, order: Sequence[Batch]) -> Iterator[list[int]]:
        """The sizes of the batches, in groups that are made at once, as for so few images the operations cost more than their
        numbers: the digits' batches sixteen at a time."""
        most = _AT_ONCE // (4 * math.prod(self.shape))
        group: list[int] = []
        for batch in order:
            if group and sum(group) + len(batch.samples) > most:
                yield group
                group = []
            group.append(len(batch.samples))
        yield group

    def _evaluation(self, samples: Tensor) -> Tensor:
        images = self._rows.view(self._samples, -1).index_select(0, samples).view(-1, self._rows.shape[1])
        return self._as_batch(images.float().sub_(self._mean).mul_(self._scale))

    def _augmented(self, samples: Tensor, chosen: Tensor, maps: "_Maps", seeds: list[int] | None) -> Tensor:
        _, height, _ = self.shape
        down, across, centre_row, centre_column = chosen
        rows = samples[:, None] * height + maps.rows.index_select(0, down)
        images = self._rows.index_select(0, rows.view(-1)).view(-1, height, self._rows.shape[1])
        columns = maps.columns.index_select(0, across)
        images = images.gather(2, columns[:, None, :].expand(-1, height, -1))
        if maps.rows_inside is not None and maps.columns_inside is not None:
            images.mul_(maps.rows_inside.index_select(0, down)[:, :, None])
            images.mul_(maps.columns_inside.index_select(0, across)[:, None, :])
        if seeds is not None:
            images = self._randaugmented(images, seeds)
        normalised = images.view(-1, self._rows.shape[1]).float().sub_(self._mean)
        if maps.rows_uncut is None:
            return self._as_batch(normalised.mul_(self._scale))
        # The row of scales that a row of pixels takes: that of the centre's column, or the last one, without a cut.
        untouched = len(maps.scales) - 1
        taken = centre_column[:, None].masked_fill(maps.rows_uncut.index_select(0, centre_row), untouched)
        return self._as_batch(normalised.mul_(maps.scales.index_select(0, taken.view(-1))))

    def _randaugmented(self, rows: Tensor, seeds: list[int]) -> Tensor:
        """Rows ``[B, H, W · C]``, uint8, of which each image goes through RandAugment with a seed of its own."""
        images = []
        for image, seed in zip(self._as_batch(rows), seeds, strict=True):
            torch.default_generator.manual_seed(seed)  # from which RandAugment draws
            images.append(_RANDAUGMENT(image))
        return torch.stack(images).permute(0, 2, 3, 1).reshape(rows.shape)

    def _as_batch(self, rows: Tensor) -> Tensor:
        """Rows ``[B · H, W · C]`` as ``[B, C, H, W]``, without a copy."""
        channels, height, width = self.shape
        return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._rows.device, non_blocking=True)


@dataclass(frozen=True)
class _Maps:
    """Every shift, mirror and cut that an augmentation can make, in one line each: an image's own is then a lookup.

    Attributes:
        shifts: 2t + 1, how many there are.
        flip: whether images are mirrored.
        rows: int64 ``[2t + 1, H]``, for each shift down the row that comes to each place.
        rows_inside: uint8 ``[2t + 1, H]``, 0 where the background comes in; None if the border is mirrored.
        columns, columns_inside: the same of shifts to the right, not mirrored and mirrored in turn, and for each of the channels:
            ``[2 · (2t + 1), W · C]``.
        rows_uncut: bool ``[H, H]``, for each centre the rows outside the cutout; None without one.
        scales: float32 ``[W + 1, W · C]``, for each centre what a row in the cutout is multiplied by: 0 in its columns. The last
            is for the rows outside.
    """

    shifts: int
    flip: bool
    rows: Tensor
    rows_inside: Tensor | None
    columns: Tensor
    columns_inside: Tensor | None
    rows_uncut: Tensor | None
    scales: Tensor

    @staticmethod
    def make(shape: tuple[int, int, int], augmentation: Augmentation, scale: Tensor) -> "_Maps":
        """``scale`` is float32 ``[W · C]``; the maps are on its device."""
        channels, height, width = shape
        device = scale.device
        rows, rows_inside = _shifted(height, augmentation, device)
        columns, columns_inside = _shifted(width, augmentation, device)
        columns = _with_mirrored(columns)[:, :, None] * channels + torch.arange(channels, device=device)
        columns_inside = _with_mirrored(columns_inside).repeat_interleave(channels, dim=1)
        background = augmentation.border == "background"
        columns_uncut = _uncut(width, augmentation.cutout, device).repeat_interleave(channels, dim=1)
        return _Maps(
            shifts=2 * augmentation.translate + 1,
            flip=augmentation.flip,
            rows=rows,
            rows_inside=rows_inside if background else None,
            columns=columns.flatten(1),
            columns_inside=columns_inside if background else None,
            rows_uncut=_uncut(height, augmentation.cutout, device) if augmentation.cutout else None,
            scales=torch.cat([columns_uncut * scale, scale[None]]),
        )

    def choose(self, uniforms: Tensor) -> Tensor:
        """Of ``[n, 5]`` random numbers: int64 ``[4, n]``, lines of ``rows`` and ``columns``, row and column of the centre."""
        down, right, mirrored, centre_row, centre_column = uniforms.unbind(1)
        across = 2 * (right * self.shifts).long()
        if self.flip:
            across += mirrored < 0.5
        height, width = self.rows.shape[1], len(self.scales) - 1
        return torch.stack(
            [(down * self.shifts).long(), across, (centre_row * height).long(), (centre_column * width).long()]
        )


def _shifted(size: int, augmentation: Augmentation, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each shift −t … t: where each place's pixel comes from, mirrored at the border (int64), and whether that is within the
    image (uint8). Both ``[2t + 1, size]``."""
    shifts = torch.arange(-augmentation.translate, augmentation.translate + 1, device=device)
    wanted = torch.arange(size, device=device) - shifts[:, None]
    source = (size - 1) - (wanted.abs() - (size - 1)).abs()
    # A shift by the whole image, which only a background can have, is mirrored to −1.
    return source.clamp(min=0), (source == wanted).to(torch.uint8)


def _with_mirrored(maps: Tensor) -> Tensor:
    """Each line twice, the second time from right to left."""
    return torch.stack([maps, maps.flip(1)], dim=1).flatten(0, 1)


def _uncut(size: int, side: int, device: torch.device) -> Tensor:
    """For each centre, the places that the square does not cover: bool ``[size, size]``."""
    places = torch.arange(size, device=device)
    start = places[:, None] - side // 2
    return (places < start) | (places >= start + side)
