import json
import re
import shutil

import numpy as np
import pytest
import torch
from made_runs import make_run

from r2d2fast import machine
from r2d2fast.report.cli import main
from r2d2fast.report.groups import make_groups
from r2d2fast.report.runs import read_run
from r2d2fast.report.tables import settings_table
from r2d2fast.train import cli as train
from tests.limits import file_size_limit

TINY = [
    *("--stage1.epochs=20", "--stage1.cosine-epochs=20", "--stage2.epochs=3", "--stage2.repredict-epochs=2"),
    *("--stage2.lrs=0.1,0.05", "--stage3.epochs=1", "--device=cpu"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory of two real runs of the digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("trained") / "runs"
    assert train.main([*TINY, "--runs", "2", "--run-dir", str(directory)]) == 0
    torch.set_num_threads(threads)
    return directory


def test_real_runs(trained, tmp_path, capsys):
    output = tmp_path / "deep" / "digits.html"
    assert main([str(trained), "--output", str(output)]) == 0
    assert f"2 runs of 1 configuration, 2 finished: {output}" in capsys.readouterr().out
    page, table = output.read_text(), output.with_suffix(".md").read_text()
    errors = [json.loads((trained / f"run{n}" / "results.json").read_text())["test_error"] for n in (0, 1)]
    assert f"{sum(errors) / 2:.2f} ± " in table
    assert f"{errors[0]:.2f}" in page
    assert re.search(r"\| 360 +\| 2 of 2 +\|", table)  # test images
    assert "No gallery" not in page
    told = re.search(r"(\d+) of (\d+) are wrong then", page)
    rows = [json.loads(line) for line in (trained / "run0" / "metrics.jsonl").open()]
    learned = [row for row in rows if row["stage"] == 2][-1]["pseudo_label_error"]
    assert 100 * int(told[1]) / int(told[2]) == pytest.approx(learned)
    assert page.count("data:image/png") > 1
    assert "Theorem 1" in page
    assert f"commit {machine.versions()['commit']}" in page
    assert (
        f"{machine.describe_run(torch.device('cpu'), 1)['cpu']}, {machine.describe()['python'].split(', ')[1]}" in page
    )


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A directory of runs with seeds 0 to 3: of embeddings, of a copy, of others with the same labels, and one more of the
    copy, which is not finished."""
    root = tmp_path_factory.mktemp("embeddings")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    for name in ("a", "other"):
        (root / name).mkdir()
        np.save(root / name / "train.npy", rng.normal(size=(60, 4)).astype(np.float32) + labels[:, None])
        np.save(root / name / "train_labels.npy", np.where(np.arange(60) < 12, labels, -1))
        np.save(root / name / "test.npy", rng.normal(size=(30, 4)).astype(np.float32) + labels[:30, None])
        np.save(root / name / "test_labels.npy", labels[:30])
    shutil.copytree(root / "a", root / "copy")
    for seed, name in enumerate(("a", "copy", "other", "copy")):
        run = [f"--run-dir={root}/runs/{seed}", f"--data-dir={root}/{name}", f"--seed={seed}", "--device=cpu"]
        assert train.main(["--dataset=embeddings", "--stage1.epochs=2", "--stage2.epochs=1", "--threads=1", *run]) == 0
    (root / "runs" / "3" / "results.json").unlink()
    return root


def test_equal_embeddings_in_two_folders_are_one_configuration_and_others_another(embeddings):
    one, other = make_groups([read_run(embeddings / "runs" / str(seed)) for seed in range(4)])
    assert [run.config["seed"] for run in one.runs] == [0, 1, 3]
    assert [run.config["seed"] for run in other.runs] == [2]
    assert [one.title, other.title] == [f"A: data_dir {embeddings / 'a'}", f"B: data_dir {embeddings / 'other'}"]


def test_from_the_command_line_is_what_it_said(embeddings):
    (group,) = make_groups([read_run(embeddings / "runs" / "0")])
    named = {name for name, _, source in settings_table(group).rows if source.startswith("command line")}
    assert named == {
        "dataset",
        "stage1.epochs",
        "stage1.cosine_epochs",
        "stage2.epochs",
        "stage2.repredict_epochs",
        "stage2.lrs",
    }  # of which three hang on the epochs


def test_damaged_runs_are_named_left_out_and_tell_in_the_exit_status(tmp_path, capsys):
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad") / "results.json").write_text("{")
    output = tmp_path / "report.html"
    assert main([str(tmp_path / "good"), str(tmp_path / "bad"), "--output", str(output)]) == 1
    assert f"left out: {tmp_path / 'bad' / 'results.json'} is damaged" in capsys.readouterr().err
    assert f"{tmp_path / 'bad' / 'results.json'} is damaged" in output.read_text()
    assert "Left out: " in output.with_suffix(".md").read_text()


def test_an_unfinished_run_is_no_failure(tmp_path):
    make_run(tmp_path / "run", done=3)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    assert "3 of 6 epochs" in (tmp_path / "report.html").read_text()


def test_without_any_good_run_nothing_is_written(tmp_path, capsys):
    (make_run(tmp_path / "bad") / "config.json").write_text("{")
    assert main([str(tmp_path / "bad"), "--output", str(tmp_path / "report.html")]) == 1
    assert "none of the runs could be read" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_directory_without_runs_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nothing"), "--output", str(tmp_path / "report.html")]) == 1
    assert f"{tmp_path / 'nothing'} is no directory" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "said"), [([], "no run directory named"), (["x", "--output", "r.md"], "r.md")])
def test_a_command_line_that_does_not_fit(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_names_that_are_no_text_are_written(tmp_path):
    name = b"caf\xe9".decode(errors="surrogateescape")
    make_run(tmp_path / "run", {"split_file": name})
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    assert "caf\\udce9" in (tmp_path / "report.html").read_text()


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "file" / "report.html")]) == 1
    assert f"cannot write {tmp_path / 'file' / 'report.md'}" in capsys.readouterr().err


def test_on_a_full_disk_the_page_before_stays(tmp_path, capsys):
    make_run(tmp_path / "run")
    output = tmp_path / "report.html"
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 0
    before = output.read_text()
    with file_size_limit(4000):
        assert main([str(tmp_path / "run"), "--output", str(output)]) == 1
    assert re.search(r"cannot write .*report.html: .*File too large.*another --output", capsys.readouterr().err)
    assert output.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "run"]
