from itertools import pairwise

import numpy as np
import pytest
import torch
from same_run import state
from small_data import CONFIG, trainer_after

from r2d2fast.data import BatchSampler
from r2d2fast.train.callback import Callback
from r2d2fast.train.errors import TrainingError
from r2d2fast.train.pseudo_labels import Moment, find_pseudo_labels, read_pseudo_labels, save_pseudo_labels

# Of the tiny run, which repredicts before epochs 2 and 4 of stage 2, and before stage 3.
MOMENTS = [
    Moment(2, 0, "predicted"),
    Moment(2, 2, "predicted"),
    Moment(2, 4, "predicted"),
    Moment(2, 5, "learned"),
    Moment(3, 0, "predicted"),
]


def everything(directory):
    return {moment: read_pseudo_labels(path) for moment, path in find_pseudo_labels(directory).items()}


def labelled(directory):
    return sorted(int(line.split()[0]) for line in (directory / "labelled.txt").read_text().splitlines())


def assert_is_the_bank(recorded, directory, prediction):
    """Of the last checkpoint; the last ``prediction`` was before that epoch of the run, and ordered the rows."""
    classes, confidence = recorded
    assert (classes.dtype, confidence.dtype) == (np.int32, np.float16)
    assert (classes < 0).nonzero()[0].tolist() == labelled(directory)
    assert (confidence[classes < 0] == 1).all()
    probs = state(directory)[1]["bank"].softmax(1)
    known, unknown = (torch.from_numpy(mask.nonzero()[0]) for mask in (classes < 0, classes >= 0))
    (order,) = BatchSampler(known, unknown, 0, 0, 1).partition(prediction)
    assert classes[order].tolist() == probs.argmax(1).tolist()
    np.testing.assert_allclose(confidence[order], probs.amax(1), atol=5e-4)


def test_each_prediction_and_what_was_learned_is_recorded(finished):
    found = everything(finished)
    assert list(found) == MOMENTS
    assert_is_the_bank(found[MOMENTS[-1]], finished, 9)  # nothing has moved it since
    for earlier, later in pairwise(MOMENTS):
        assert (found[earlier][1] != found[later][1]).any()


def test_what_was_learned_is_the_bank_at_the_end_of_stage_2(tmp_path, train_here):
    assert train_here("--stages", "1,2", "--run-dir", tmp_path / "run") == 0
    found = everything(tmp_path / "run")
    assert list(found) == MOMENTS[:-1]
    assert_is_the_bank(found[Moment(2, 5, "learned")], tmp_path / "run", 8)
    assert train_here("--stages", "1", "--run-dir", tmp_path / "other") == 0
    assert find_pseudo_labels(tmp_path / "other") == {}


def test_a_prediction_is_recorded_before_a_step_moves_it():
    trainer = trainer_after(2)
    seen = []

    class Predicted(Callback):
        def predicted(self, trainer):
            seen.append((trainer.position.step, trainer.method.bank.pseudo_logits.clone()))

    trainer.callback = Predicted()
    trainer.run_epoch()
    ((step, rows),) = seen
    assert step == 0
    assert not torch.equal(rows, trainer.method.bank.pseudo_logits)


@pytest.mark.slow
def test_a_resumed_run_records_what_one_left_alone_does(start_run, finished, tmp_path):
    directory = tmp_path / "run"
    process = start_run("--run-dir", directory)
    while not (directory / "pseudo_labels" / "stage2-00002-predicted.npz").exists():
        assert process.is_alive()
    process.kill()
    process.join()
    for path in find_pseudo_labels(directory).values():
        path.write_bytes(b"half a fi")
    process = start_run("--resume", "--run-dir", directory)
    process.join()
    assert process.exitcode == 0
    found, expected = find_pseudo_labels(directory), everything(finished)
    assert list(found) == MOMENTS
    # Those after the checkpoint are written again, at least what stage 2 learned and the prediction after it.
    for moment in MOMENTS[3:]:
        for one, other in zip(read_pseudo_labels(found[moment]), expected[moment], strict=True):
            assert (one == other).all()


def test_other_files_are_left_alone_and_bad_ones_named(tmp_path):
    trainer = trainer_after(len(CONFIG.stages))
    save_pseudo_labels(trainer, tmp_path, Moment(2, 10, "predicted"))
    save_pseudo_labels(trainer, tmp_path, Moment(2, 9, "predicted"))
    folder = tmp_path / "pseudo_labels"
    (folder / "stage2-mine.npz").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    found = find_pseudo_labels(tmp_path)
    assert list(found) == [Moment(2, 9, "predicted"), Moment(2, 10, "predicted")]
    path = found[Moment(2, 9, "predicted")]
    whole = path.read_bytes()
    for damage in (b"", whole[:-20], whole[:40], whole[:90] + bytes([whole[90] ^ 255]) + whole[91:]):
        path.write_bytes(damage)
        with pytest.raises(TrainingError, match=f"{path.name} cannot be read"):
            read_pseudo_labels(path)
    with path.open("wb") as file:
        np.savez(file, classes=np.zeros(3), confidence=np.zeros(4))
    with pytest.raises(TrainingError, match="is damaged"):
        read_pseudo_labels(path)
    path.unlink()
    with pytest.raises(TrainingError, match="cannot be read"):
        read_pseudo_labels(path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"cannot write .*pseudo_labels"):
        save_pseudo_labels(trainer, tmp_path / "file", Moment(2, 0, "predicted"))
