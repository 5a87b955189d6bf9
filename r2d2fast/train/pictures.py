"""The two pictures of a run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from r2d2fast.train.files import write_atomically

# By what there is to see, not by epochs: a stage of 15 must stay readable beside one of 300.
PANEL_WIDTHS = {1: 3, 2: 5, 3: 2.2}
ERROR_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)


def stage_title(stage: int, method: str) -> str:
    """What a stage does."""
    second = "D2, then R2" if method == "r2d2" else method
    return f"stage {stage}: {({1: 'supervised', 2: second, 3: 'fine-tuning'})[stage]}"


def draw_curves(directory: Path, rows: list[dict[str, Any]], method: str) -> None:
    """``curves.png``: test error and pseudo-label error in percent over the epochs, a panel for each stage.

    What is None, for want of test samples or of true labels, is left out.
    """
    stages = sorted({row["stage"] for row in rows})
    panels = [[row for row in rows if row["stage"] == stage] for stage in stages]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    widths = [PANEL_WIDTHS[stage] for stage in stages]
    axes = figure.subplots(1, len(stages), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axis, stage, panel in zip(axes, stages, panels, strict=True):
        epochs = np.arange(1, len(panel) + 1)
        test_errors = np.array([row["test_error"] for row in panel], dtype=float)  # None becomes NaN
        measured = np.isfinite(test_errors)
        axis.plot(epochs[measured], test_errors[measured], color="black", label="test error")
        if stage > 1:
            label_errors = np.array([row["pseudo_label_error"] for row in panel], dtype=float)
            axis.plot(epochs, label_errors, color="tab:orange", linestyle="--", label="pseudo-label error")
        mark_repredictions(axis, reprediction_places(panel))
        if np.isfinite(test_errors[-1]):
            axis.annotate(
                f"{test_errors[-1]:.1f} %",
                (epochs[-1], test_errors[-1]),
                xytext=(-4, 12),
                textcoords="offset points",
                ha="right",
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
        axis.set(title=stage_title(stage, method), xlabel="epoch", yscale="log")
        axis.set_yticks(ERROR_TICKS)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", alpha=0.3)
    errors = [row[key] for row in rows for key in ("test_error", "pseudo_label_error") if row[key]]
    axes[0].set(ylabel="error (%)", ylim=(0.7 * min(errors, default=1), 100))
    legend_axis = axes[min(1, len(axes) - 1)]
    if legend_axis.lines:
        legend_axis.legend(loc="upper right")
    save_picture(figure, directory / "curves.png")


def draw_pseudo_labels(directory: Path, rows: list[dict[str, Any]]) -> None:
    """``pseudo_labels.png``: mean top probability of pseudo-labels and of predictions in stage 2, if it was run by R2-D2.

    That pseudo-labels become flatter than the predictions is Theorem 2 of the paper; a reprediction sets them back.
    """
    panel = [row for row in rows if "pseudo_confidence" in row]
    if not panel:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    epochs = np.arange(1, len(panel) + 1)
    every = max(1, len(panel) // 20)
    for key, label, color, line, marker in (
        ("prediction_confidence", "predictions (network)", "black", "-", "o"),
        ("pseudo_confidence", "pseudo-labels (learned)", "tab:orange", "--", "s"),
    ):
        values = [row[key] for row in panel]
        axis.plot(
            epochs, values, color=color, linestyle=line, marker=marker, markersize=4, markevery=every, label=label
        )
    mark_repredictions(axis, reprediction_places(panel))
    axis.set(
        title="confidence on unlabelled samples", xlabel="epoch of stage 2", ylabel="mean of the largest probability"
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    save_picture(figure, directory / "pseudo_labels.png")


def mark_repredictions(axis: Axes, places: Sequence[float], color: str = "tab:blue") -> None:
    """Dotted vertical lines at ``places``, with an entry in the legend."""
    for n, place in enumerate(places):
        axis.axvline(place, color=color, linestyle=":", label=None if n else "reprediction")


def reprediction_places(rows: list[dict[str, Any]]) -> list[float]:
    """Where the repredictions of these rows of metrics stand on an axis that counts epochs from 1."""
    return sorted({row["epoch"] + 0.5 for row in rows if row.get("repredicted")})


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG file. Raises TrainingError where that cannot be."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
