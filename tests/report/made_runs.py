"""Run directories made up for tests: everything in them is what the test says."""

import io
import json

import numpy as np
import torch

from r2d2fast.data import Dataset, Preprocessing, ResidentImages
from r2d2fast.models import export_safetensors
from r2d2fast.train.recipes import RECIPES, flags

CONFIG = {
    **flags(RECIPES["digits"].config),
    **{"split": 0, "num_labels": 2, "stages": [1, 2, 3], "data_dir": "/data"},
    **{"stage1.epochs": 2, "stage2.epochs": 3, "stage2.repredict_epochs": [1], "stage2.lrs": [0.1, 0.01]},
    **{"stage3.epochs": 1, "split_file": None, "run_dir": None},
}
EPOCHS = ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0))


def rows(errors=(60.0, 40.0, 30.0, 25.0, 20.0, 10.0), pseudo=(28.0, 24.0, 18.0, 9.0)):
    """Metrics of all epochs, with the test errors given and the pseudo-label errors from stage 2 on."""
    made = []
    for number, (stage, epoch) in enumerate(EPOCHS):
        row = {"stage": stage, "epoch": epoch, "repredicted": (stage, epoch) == (2, 1), "test_error": errors[number]}
        row["pseudo_label_error"] = pseudo[number - 2] if stage > 1 else None
        if stage == 2:
            row |= {"prediction_confidence": 0.9 + epoch / 100, "pseudo_confidence": 0.8 + epoch / 100}
        made.append(row)
    return made


def results(made, **changed):
    """As the trainer sums up such rows."""
    stages = []
    for stage in sorted({row["stage"] for row in made}):
        of_stage = [row for row in made if row["stage"] == stage]
        entry = {"stage": stage, "epochs": len(of_stage), "test_error": of_stage[-1]["test_error"]}
        stages.append(entry | ({"d2_test_error": of_stage[0]["test_error"]} if stage == 2 else {}))
    return {"stages": stages, "test_error": made[-1]["test_error"], "seconds": 12.0, "test_images": 360, **changed}


def make_run(directory, config=None, made=None, done=None, **changed):
    """A run: finished, unless only the first ``done`` epochs are there; ``changed`` are results."""
    directory.mkdir(parents=True)
    config = {**CONFIG, **(config or {})}
    made = [row for row in (made or rows()) if row["stage"] in config["stages"]]
    (directory / "config.json").write_text(json.dumps(config, default=str))
    (directory / "labelled.txt").write_text("0 zero\n1 one\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made[:done]))
    if done is None:
        (directory / "results.json").write_text(json.dumps(results(made, **changed)))
    return directory


def record(directory, name, classes, confidence):
    """Pseudo-labels, as the trainer records them."""
    (directory / "pseudo_labels").mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, classes=np.int32(classes), confidence=np.float16(confidence))
    (directory / "pseudo_labels" / f"{name}.npz").write_bytes(buffer.getvalue())


def record_data(run, names=("a.png", "b.png"), classes=("cat", "dog"), shape=(3, 8, 8), std=(9.0, 8.0, 7.0), tests=360):
    """What a finished run writes of its images."""
    (run.directory / "labels.csv").write_text("name,class\n" + "".join(f'"{name}",cat\n' for name in names))
    preprocessing = Preprocessing("small images", shape, (1.0,) * len(std), std)
    about = {"classes": json.dumps(classes), "preprocessing": preprocessing.to_json()}
    (run.directory / "network.safetensors").write_bytes(export_safetensors(torch.nn.Linear(2, 2), about))
    run.results["test_images"] = tests


def dataset(truth, class_names=("zero", "one", "two"), channels=1):
    """Images of one grey (or colour) each: sample s has pixel value 10 s in the first channel, 0 in the others."""
    pixels = torch.zeros(len(truth), channels, 4, 4, dtype=torch.uint8)
    pixels[:, 0] = 10 * torch.arange(len(truth), dtype=torch.uint8)[:, None, None]
    images = ResidentImages(pixels, torch.full((channels,), 7.0), torch.full((channels,), 3.0), torch.device("cpu"))
    labels = torch.tensor(truth)
    names = [f"image {number}" for number in range(len(truth))]
    return Dataset(images, images, labels, labels, class_names, names)
