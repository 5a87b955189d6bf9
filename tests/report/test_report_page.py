import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_runs import dataset, make_run, record, record_data, rows
from PIL import Image

from r2d2fast.report.groups import make_groups
from r2d2fast.report.page import make_markdown, make_page
from r2d2fast.report.runs import read_run
from r2d2fast.report.tables import settings_table
from r2d2fast.train.recipes import RECIPES, flags, recipe_for

EVIL = '<script>alert("1")</script>|`&\'\n<img src=x>'
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements, in the order of their beginnings, of a page in which every one that is not void is closed where it must be."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), tag
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def groups_of(*directories):
    return make_groups([read_run(directory) for directory in directories])


TRUTH = [0, 1, 2, 0, 1, 2, 0]


def recorded(directory):
    record(directory, "stage2-00000-predicted", [-1, -1, 0, 0, 2, 2, 1], [1] * 7)
    record(directory, "stage2-00003-learned", [-1, -1, 1, 1, 1, 1, 0], [1] * 7)
    return directory


@pytest.fixture
def page(tmp_path):
    made = rows()
    for row in made[2:5]:
        row |= {"theorem1_gap": 0.25, "theorem2_share": 0.75, "sum_drift": 2e-7}
    directories = [
        recorded(make_run(tmp_path / "one", made=made)),
        make_run(tmp_path / "two", {"seed": 1}, machine={"cpu": "Z80", "threads": 1}, versions={"commit": "abc"}),
        make_run(tmp_path / "three", {"alpha": 0.4}, done=3),
    ]
    return make_page(groups_of(*directories), ["four: damaged"], lambda run: dataset(TRUTH))


def test_the_page_is_well_formed_and_has_what_it_should(page):
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.all("html") == [{"lang": "en"}]
    text = " ".join(" ".join(parsed.texts).split())
    for said in (
        "3 runs of 2 configurations, 2 finished",
        "four: damaged",
        "A: alpha 0.1",
        "B: alpha 0.4",
        "10.00 ± 0.00",
        "3 of 6 epochs, now at 30.00 %",
        "Theorem 1",
        "The surest mistakes",
        "has recorded no pseudo-labels yet",
        "Z80, 1 thread",
        "commit abc",
        "command line; the recipe has 0.1 (paper)",
    ):
        assert said in text, said


def test_the_page_needs_no_other_file_and_no_network(page):
    parsed = Page(page)
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"url\((?!#)|@import|//[a-z]", page)
    assert {tag for tag, _ in parsed.elements} & {"script", "link", "iframe", "object", "base"} == set()
    for attributes in (attributes for _, attributes in parsed.elements):
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert attributes.get("href", "#").startswith("#")
    assert any("default-src 'none'" in str(meta.get("content")) for meta in parsed.all("meta"))


def test_the_page_can_be_read_aloud_and_by_keyboard(page):
    parsed = Page(page)
    assert all(image["alt"] for image in parsed.all("img"))
    assert parsed.all("img")
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in parsed.all("svg"))
    assert all(cell.get("scope") in ("col", "row") for cell in parsed.all("th"))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in parsed.all("div") if box["class"] == "scroll")
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {name for name in re.findall(r'href="#(\w+)"|url\(#(\w+)\)', page) for name in name if name}
    assert used == set(ids)
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        assert len({len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}) == 1


def test_no_name_becomes_part_of_the_page(tmp_path):
    directory = tmp_path / "<b>&amp;"
    evil = {"backbone": EVIL, "split_file": EVIL, "dataset": EVIL}
    made = make_run(directory, evil, machine={"cpu": EVIL}, versions={"torch": EVIL})
    groups = groups_of(recorded(made), make_run(tmp_path / "b"))
    data = dataset(TRUTH, [EVIL, EVIL + "2", EVIL + "3"])
    data.train_names[:] = [EVIL] * len(TRUTH)
    page = make_page(groups, [EVIL], lambda run: data)
    parsed = Page(page)
    assert parsed.all("script", "b") == []
    assert not [image for image in parsed.all("img") if image["src"] == "x"]
    assert sum(EVIL in text for text in parsed.texts) > 5
    assert any(EVIL in image["alt"] for image in parsed.all("img"))


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_markdown_table(tmp_path):
    directories = [make_run(tmp_path / name, {"seed": number}) for number, name in enumerate("abc")]
    text = make_markdown(groups_of(*directories, make_run(tmp_path / "d", {"beta": 0.5}, done=2)), ["e: damaged"])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, rule, one, other = map(cells, lines)
    names = ["stage 1", "D2 only", "stage 2", "stage 3", "pseudo-labels", "seconds"]
    assert header == ["configuration", *names, "data set", "labels", "test images", "finished runs"]
    assert all(set(cell) == {"-"} for cell in rule)
    values = [f"{value} ± 0.00" for value in ("40.00", "30.00", "20.00", "10.00", "18.00")]
    assert one == ["A: beta 0.03", *values, "12 ± 0", "digits", "2", "360", "3 of 3"]
    assert other == ["B: beta 0.5", *["–"] * 6, "digits", "2", "–", "0 of 1"]
    assert "\n\nTest error" not in text
    assert text.endswith("\nLeft out: e: damaged\n")


def test_the_source_of_each_setting(tmp_path):
    (group,) = groups_of(make_run(tmp_path / "run", {"alpha": 0.2}))
    sources = {name: (value, source) for name, value, source in settings_table(group).rows}
    assert sources["alpha"] == ("0.2", "command line; the recipe has 0.1 (paper)")
    assert sources["beta"] == ("0.03", "paper")
    assert sources["momentum"] == ("0.9", "reference implementation")
    assert sources["backbone"] == ("small", "ours")
    assert sources["stage2.lrs"] == (
        "0.1,0.01",
        "command line; the recipe has 0.12,0.12,0.08,0.04,0.004 (reference implementation)",
    )
    assert "seed" not in sources


def sources_of(*directories):
    (group,) = groups_of(*directories)
    return {name: source for name, _, source in settings_table(group).rows}


def settings_of(recipe, data_dir, **changed):
    """As the trainer writes them."""
    return {**flags(recipe.config), "split": 0, "data_dir": str(data_dir), **changed}


def embeddings(directory, samples=900, labelled=60):
    directory.mkdir()
    np.save(directory / "train_labels.npy", np.where(np.arange(samples) < labelled, np.arange(samples) % 3, -1))
    return directory


def labelled_samples(run, count):
    (run / "labelled.txt").write_text("".join(f"{number} {number % 3}\n" for number in range(count)))


def test_the_recipe_of_embeddings_follows_the_numbers_of_samples_and_labels(tmp_path):
    data = embeddings(tmp_path / "data")
    config = settings_of(recipe_for("embeddings", data), data, **{"stage2.epochs": 7})
    labelled_samples(make_run(tmp_path / "run", config), 60)
    sources = sources_of(tmp_path / "run")
    assert config["label_lr"] != RECIPES["embeddings"].config.label_lr
    assert {sources[name] for name in ("label_lr", "stage1.epochs", "num_labels", "stage2.lrs")} == {"ours"}
    assert sources["stage2.epochs"] == "command line; the recipe has 16 (ours)"
    assert sources["dataset"] == "command line"


def test_other_embeddings_in_the_place_of_the_runs_say_nothing_of_its_recipe(tmp_path):
    data = embeddings(tmp_path / "data")
    config = settings_of(recipe_for("embeddings", data), data)
    labelled_samples(make_run(tmp_path / "run", config), 60)
    shutil.rmtree(data)
    embeddings(data, labelled=90)
    assert set(sources_of(tmp_path / "run").values()) == {"not known"}
    shutil.rmtree(data)
    embeddings(data, samples=1000)
    record(tmp_path / "run", "stage2-00000-predicted", [0] * 900, [1] * 900)
    assert set(sources_of(tmp_path / "run").values()) == {"not known"}


def test_the_recipe_of_a_folder_follows_the_kind_of_its_images(tmp_path):
    for place, side in (("small", 8), ("photographs", 80)):
        for name in ("cat", "dog"):
            (tmp_path / place / name).mkdir(parents=True)
            Image.new("RGB", (side, side)).save(tmp_path / place / name / "1.png")
        config = settings_of(recipe_for("folder", tmp_path / place), tmp_path / place, alpha=0.7)
        make_run(tmp_path / "runs" / place, config)
    small, photographs = (sources_of(tmp_path / "runs" / place) for place in ("small", "photographs"))
    assert (small["backbone"], small["alpha"]) == ("ours", "command line; the recipe has 1.0 (ours)")
    assert (photographs["backbone"], photographs["alpha"]) == ("ours", "command line; the recipe has 0.1 (paper)")


@pytest.mark.parametrize("dataset", ["folder", "embeddings"])
def test_where_the_data_are_gone_no_source_is_claimed(tmp_path, dataset):
    make_run(tmp_path / "run", settings_of(RECIPES[dataset], tmp_path / "gone", backbone="conv4"))
    assert set(sources_of(tmp_path / "run").values()) == {"not known"}


def test_the_data_of_any_run_of_a_group_tell_the_recipe(tmp_path):
    data = embeddings(tmp_path / "data")
    for seed, place in enumerate((tmp_path / "gone", data)):
        config = settings_of(recipe_for("embeddings", data), place, seed=seed)
        labelled_samples(recorded(make_run(tmp_path / str(seed), config)), 60)
        record(tmp_path / str(seed), "stage2-00000-predicted", [0] * 900, [1] * 900)
        record_data(read_run(tmp_path / str(seed)))
    assert sources_of(tmp_path / "0", tmp_path / "1")["label_lr"] == "ours"


def test_what_other_choices_bring_is_the_recipes(tmp_path):
    recipe = recipe_for("digits", method="vat", optimizer="adamw")
    make_run(tmp_path / "run", settings_of(recipe, "/data", num_labels=100))
    sources = sources_of(tmp_path / "run")
    assert (sources["stage2.epochs"], sources["method"]) == (recipe.sources["stage2.epochs"], "command line")
    assert (sources["num_labels"], sources["dataset"]) == ("command line", "default")


def test_the_pages_parts_are_installed():
    root = Path(__file__).parents[2]
    listed = re.search(r'"r2d2fast.report" = \[(.*)\]', (root / "pyproject.toml").read_text())[1]
    others = {path.name for path in (root / "r2d2fast" / "report").iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(re.findall(r'"(.*?)"', listed)) == others
