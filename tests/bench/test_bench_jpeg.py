"""The JPEG decoders do the same work, and the command says what it measured."""

import numpy as np
import pytest

from bench import jpeg


def test_in_full_all_decoders_give_the_same_pixels_and_scaled_ones_enough_of_them(monkeypatch, capsys):
    files = jpeg.photographs(1000, 500)
    for data in files:
        reference, *others = (decode(data) for decode in jpeg.DECODERS["in full"].values())
        assert reference.shape == (500, 1000, 3)
        assert all(np.array_equal(reference, pixels) for pixels in others)
        for decode in jpeg.DECODERS["scaled"].values():
            assert jpeg.SMALLEST <= decode(data).shape[0] < 300
    monkeypatch.setattr(jpeg, "SIZES", ((1000, 500),))
    jpeg.main(rounds=1)
    table = capsys.readouterr().out.partition("| pixels")[2]
    assert table.count("1000 x 500") == 5
    assert table.count("| yes") == pytest.approx(4, abs=1)  # scaled, Pillow may round otherwise
