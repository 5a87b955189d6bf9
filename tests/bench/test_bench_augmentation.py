"""Both make the same augmentations, and the table says which is faster."""

import itertools

import numpy as np
import pytest
import torch

import bench.augmentation as command

OURS, THEIRS = "r2d2fast.data.ResidentImages", "torchvision.transforms, DataLoader"


def variants(image, augmentation):
    """Every shift and mirror of one image, uint8 [32, 32, 3], normalised: float32 [n, 3, 32, 32]."""
    t = augmentation.translate
    padded = np.pad(image, ((t, t), (t, t), (0, 0)), mode="reflect")
    shifted = [padded[r : r + 32, c : c + 32] for r, c in itertools.product(range(2 * t + 1), repeat=2)]
    every = np.stack([*shifted, *(one[:, ::-1] for one in shifted)]).astype(np.float32)
    return torch.from_numpy((every - command.MEAN) / command.STD).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("recipe", command.RECIPES)
@pytest.mark.parametrize("name", [OURS, THEIRS])
def test_every_image_is_a_shifted_and_mirrored_one_with_a_square_cut_out(recipe, name):
    augmentation = command.RECIPES[recipe]
    data = command.pixels(1)
    expected = variants(data[0], augmentation)
    runs = command.prepare(np.repeat(data, 40, axis=0), augmentation, batch=16, images=40)
    batches = list(runs[name]())
    assert [len(batch) for batch in batches] == [16, 16, 8]
    found, areas = set(), set()
    for image in torch.cat(batches):
        cut = (image == 0).all(0)
        same = torch.isclose(expected, image, atol=1e-4).all(1) | cut
        matches = same.flatten(1).all(1).nonzero().flatten().tolist()
        assert len(matches) == 1
        found.add(matches[0])
        rows, columns = cut.any(1), cut.any(0)
        assert torch.equal(cut, rows[:, None] & columns)
        areas.add((int(rows.sum()), int(columns.sum())))
    assert len(found) > 20
    if augmentation.cutout:
        assert max(areas) == (16, 16)
        assert min(min(area) for area in areas) < 16
    else:
        assert areas == {(0, 0)}


def test_a_pass_is_over_different_images():
    data = np.repeat(np.arange(200, dtype=np.uint8), 32 * 32 * 3).reshape(200, 32, 32, 3)
    runs = command.prepare(data, command.RECIPES["CIFAR-10, stage 2"], batch=32, images=100)
    for run in runs.values():
        first, second = (torch.cat(list(run()))[:, 0, 0, 0].tolist() for _ in range(2))
        assert len(set(first)) == len(set(second)) == 100
        assert set(first) != set(second)


def test_the_command_prints_rates_ratios_and_verdicts(capsys, monkeypatch):
    monkeypatch.setattr(command, "SAMPLES", 256)
    monkeypatch.setattr(command, "TARGET", 1e6)
    before = torch.get_num_threads()
    command.main(images=256, rounds=2)
    assert torch.get_num_threads() == before
    printed = capsys.readouterr().out
    rates = [line for line in printed.splitlines() if OURS in line or THEIRS in line]
    assert len(rates) == 8
    verdicts = [line for line in printed.splitlines() if line.rstrip(" |").endswith("**not met**") and "≥" in line]
    assert len(verdicts) == 4
    assert all(float(line.split("|")[3]) > 0 for line in verdicts)
