"""Figures from the CSV files of a run. Needs matplotlib (`pip install megatron-llr[plots]`)."""

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llr.records import ROLES, role_of


def pyplot() -> Any:
    """Matplotlib's pyplot on a backend without a display, or an error that says how to get it."""
    try:
        import matplotlib
    except ImportError as missing:
        raise ImportError("figures need matplotlib: pip install 'megatron-llr[plots]'") from missing
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file of a run.

    Raises:
        FileNotFoundError: if the run wrote none; `--llr-log-dir` makes it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: was the run given --llr-log-dir?")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _role_rank(role: str) -> tuple[int, str]:
    return (ROLES.index(role) if role in ROLES else len(ROLES), role)


def last_measurement(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's last measurement."""
    rows = read_rows(folder / "measurements.csv")
    if not rows:
        raise ValueError(f"{folder / 'measurements.csv'} holds no measurement yet")
    last = max(int(row["iteration"]) for row in rows)
    return [row for row in rows if int(row["iteration"]) == last]


def multiplier_map(folder: Path, target: Path) -> None:
    """Heat-map block x role of the multipliers that the last measurement gave."""
    plt = pyplot()
    rows = [row for row in last_measurement(folder) if row["block"] and not row["expert"]]
    blocks = sorted({int(row["block"]) for row in rows})
    roles = sorted({row["role"] for row in rows}, key=_role_rank)
    cells = [[float("nan")] * len(roles) for _ in blocks]
    for row in rows:
        at = blocks.index(int(row["block"])), roles.index(row["role"])
        cells[at[0]][at[1]] = float(row["target_multiplier"])
    figure, axes = plt.subplots(
        figsize=(1.6 + 0.75 * len(roles), 1.4 + 0.42 * len(blocks)), layout="constrained"
    )
    image = axes.imshow(cells, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(roles)), roles)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_xlabel("role")
    axes.set_ylabel("block")
    axes.set_title(f"multipliers after the measurement before update {rows[0]['iteration']}")
    if len(blocks) <= 16:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for y, line in enumerate(cells):
            for x, value in enumerate(line):
                colour = "white" if value < middle else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="multiplier")
    figure.savefig(target, dpi=130)
    plt.close(figure)


def learning_rate_lines(folder: Path, target: Path) -> None:
    """Learning rate over the updates: a line per role (mean), a band from smallest to largest."""
    plt = pyplot()
    rates: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(folder / "learning_rates.csv"):
        role = row["matrix"].rsplit(".", 1)[-1]
        rates[role][int(row["iteration"])].append(float(row["learning_rate"]))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _role_lines(plt, axes, rates)
    axes.set_ylabel("learning rate")
    axes.set_title("learning rate per role: mean, and spread over the blocks")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.savefig(target, dpi=130)
    plt.close(figure)


def relative_update_lines(folder: Path, target: Path) -> bool:
    """Relative update over the updates beside the effective learning rate, a line per role each.

    Returns:
        False, and draws nothing, if the run recorded no relative updates.
    """
    names = {"relative_update": "‖ΔW‖ / ‖W‖", "effective_learning_rate": "learning rate / ‖W‖"}
    found = {name: _by_role(read_rows(folder / "learning_rates.csv"), name) for name in names}
    if not found["relative_update"]:
        return False
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        _role_lines(plt, axes, found[name])
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_title(f"{name.replace('_', ' ')} per role: mean and spread")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return True


def _by_role(rows: list[dict[str, str]], column: str) -> dict[str, dict[int, list[float]]]:
    """Role -> update -> the positive values of a column, which may be missing or empty."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = float(row.get(column) or "nan")
        # 0 (a warmup that begins there) has no place on a logarithmic axis.
        if value > 0:
            found[role_of(row["matrix"])][int(row["iteration"])].append(value)
    return found


def _role_lines(plt: Any, axes: Any, values: Mapping[str, Mapping[int, list[float]]]) -> None:
    """A line per role through the means, a band from smallest to largest."""
    colours = plt.get_cmap("tab10")
    for index, role in enumerate(sorted(values, key=_role_rank)):
        updates = sorted(values[role])
        found = [values[role][update] for update in updates]
        means = [sum(each) / len(each) for each in found]
        axes.plot(updates, means, label=role, color=colours(index % 10), linewidth=1.6)
        axes.fill_between(
            updates,
            [min(each) for each in found],
            [max(each) for each in found],
            color=colours(index % 10),
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xlabel("update")
    axes.legend(ncols=2, fontsize=8)
