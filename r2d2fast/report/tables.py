"""The tables of a report, as text in rows and columns, for the page and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from r2d2fast.report.groups import COLUMNS, PSEUDO_LABELS, WHOLE_NUMBERS, Group, results_of, value_text
from r2d2fast.report.recipe import NOT_KNOWN, recipe_of_group
from r2d2fast.report.runs import Run
from r2d2fast.tables import NO_VALUE, markdown, markdown_table, mean_std

AGAIN = ", not counted: another run has its seed and split"
_EXPLANATION = (
    "Test error in percent at the end of each stage, of its last epoch and never of the best: mean ± sample standard deviation "
    "over the finished runs, which differ in seed and split; of several with one seed and split the first counts."
)


@dataclass(frozen=True)
class Table:
    """A caption, a heading for each column, and rows whose first cell is the heading of the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as Markdown, with its caption as a paragraph before it."""
        return f"{markdown(self.caption)}\n\n{markdown_table(self.header, self.rows)}\n"


def results_table(groups: list[Group]) -> Table:
    """A row for each configuration."""
    names = [name for name in COLUMNS if any(name in group.results for group in groups)]
    notes = [_EXPLANATION]
    if "D2 only" in names:
        notes.append("D2 only: stage 2 before its first reprediction.")
    if PSEUDO_LABELS in names:
        notes.append("Pseudo-labels: error of what stage 2 has learned for the unlabelled samples.")
    rows = []
    for group in groups:
        cells = [mean_std(group.results.get(name, []), digits=0 if name in WHOLE_NUMBERS else 2) for name in names]
        counts = f"{len(group.finished)} of {len(group.runs)}"
        if len(group.counted) < len(group.finished):
            counts += f", {len(group.counted)} counted"
        images = sorted(
            {run.results["test_images"] for run in group.finished if run.results and "test_images" in run.results}
        )
        settings = [
            str(group.settings["dataset"]),
            str(group.settings["num_labels"]),
            ", ".join(map(str, images)) or NO_VALUE,
        ]
        rows.append([group.title, *cells, *settings, counts])
    # Errors first, because a phone shows no more than three columns.
    return Table(" ".join(notes), ["configuration", *names, "data set", "labels", "test images", "finished runs"], rows)


def runs_table(group: Group) -> Table:
    """A row for each run. One that is not finished shows the last error that it has."""
    names = [name for name in COLUMNS if name in group.results]
    rows = []
    for run in group.runs:
        again = run.results is not None and run not in group.counted
        if run.results is None:
            error = run.rows[-1]["test_error"] if run.rows else None
            last = "" if error is None else f", now at {error:.2f} %"
            cells = [""] * len(names)
        else:
            last, values = "", results_of(run)
            cells = [f"{values[name]:.{0 if name in WHOLE_NUMBERS else 2}f}" for name in names]
        numbers = [str(run.config["seed"]), str(run.config["split_file"] or run.config["split"])]
        rows.append([str(run.directory), *numbers, f"{run.state}{last}{AGAIN * again}", *cells])
    return Table("The runs, errors in percent", ["run", "seed", "split", "state", *names], rows)


def settings_table(group: Group) -> Table:
    """Every setting that the runs have in common, and where its value is from."""
    recipe = recipe_of_group(group)
    rows = [
        [name, value_text(value), NOT_KNOWN if recipe is None else recipe.source(name)]
        for name, value in group.settings.items()
    ]
    return Table("Settings of these runs, by the names of their flags", ["setting", "value", "from"], rows)


def origin_table(group: Group) -> Table | None:
    """The machines and the code that the runs were finished with; None where no run is finished."""
    origins: dict[tuple[str, str], list[Run]] = {}
    for run in group.finished:
        origins.setdefault(_origin(run), []).append(run)
    rows = [[", ".join(str(run.config["seed"]) for run in runs), *origin] for origin, runs in origins.items()]
    return Table("Machine and code that ended the runs", ["seeds", "machine", "code"], rows) if rows else None


def _origin(run: Run) -> tuple[str, str]:
    assert run.results is not None
    machine, versions = (run.results.get(name) or {} for name in ("machine", "versions"))
    where = [machine.get("gpu"), machine.get("cpu"), machine.get("platform")]
    for name, one in (("processes", "process"), ("threads", "thread")):
        if name in machine:
            where.append(f"{machine[name]} {one if machine[name] == 1 else name}")
    code = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join(filter(None, where)) or "not recorded", ", ".join(code) or "not recorded"
