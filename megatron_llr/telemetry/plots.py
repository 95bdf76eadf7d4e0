"""Figures from the CSV files of a run. Needs matplotlib (`pip install megatron-llr[plots]`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llr.matrices.ids import ROLES
from megatron_llr.telemetry.read_logs import last_measurement, rates_by_role
from megatron_llr.telemetry.tables import Spread


def pyplot() -> Any:
    """Matplotlib's pyplot on a backend without a display, or an error that says how to get it."""
    try:
        import matplotlib
    except ImportError as missing:
        raise ImportError("figures need matplotlib: pip install 'megatron-llr[plots]'") from missing
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _role_rank(role: str) -> tuple[int, str]:
    return (ROLES.index(role) if role in ROLES else len(ROLES), role)


def multiplier_map(folder: Path, target: Path) -> bool:
    """Heat-map block x role of the multipliers that the last measurement gave.

    Where a block has several matrices of a role (experts), their mean.

    Returns:
        False, and draws nothing, if no block has a multiplier.
    """
    plt = pyplot()
    measured = last_measurement(folder)
    found = {
        (int(block), role): spread.mean
        for (block, role), spread in measured.multipliers.items()
        if block.isdigit()
    }
    if not found:
        return False
    blocks = sorted({block for block, _ in found})
    roles = sorted({role for _, role in found}, key=_role_rank)
    cells = [[found.get((block, role), float("nan")) for role in roles] for block in blocks]
    figure, axes = plt.subplots(
        # Of thousands of blocks, an image that can still be opened.
        figsize=(1.6 + 0.75 * len(roles), min(1.4 + 0.42 * len(blocks), 60)),
        layout="constrained",
    )
    image = axes.imshow(cells, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(roles)), roles, rotation=45 if len(roles) > 8 else 0)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_xlabel("role")
    axes.set_ylabel("block")
    axes.set_title(f"multipliers after the measurement before update {measured.iteration}")
    if len(blocks) <= 16:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for y, line in enumerate(cells):
            for x, value in enumerate(line):
                if value == value:
                    colour = "white" if value < middle else "black"
                    text = f"{value:.2f}"
                    axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="multiplier")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return True


def learning_rate_lines(folder: Path, target: Path) -> None:
    """Learning rate over the updates: a line per role (mean), a band from smallest to largest."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _role_lines(plt, axes, rates_by_role(folder, "learning_rate"))
    axes.set_ylabel("learning rate")
    axes.set_title("learning rate per role: mean, and spread over the blocks")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.savefig(target, dpi=130)
    plt.close(figure)


def relative_update_lines(folder: Path, target: Path) -> bool:
    """Relative update and effective learning rate over the updates: a panel each, a line per role.

    Returns:
        False, and draws nothing, if the run recorded no relative updates.
    """
    names = {"relative_update": "‖ΔW‖ / ‖W‖", "effective_learning_rate": "learning rate / ‖W‖"}
    found = {name: rates_by_role(folder, name, above_zero=True) for name in names}
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


def _role_lines(plt: Any, axes: Any, values: Mapping[str, Mapping[int, Spread]]) -> None:
    """A line per role through the means, a band from smallest to largest."""
    colours = plt.get_cmap("tab20" if len(values) > 10 else "tab10")
    for index, role in enumerate(sorted(values, key=_role_rank)):
        colour, updates = colours(index % colours.N), sorted(values[role])
        found = [values[role][update] for update in updates]
        axes.plot(updates, [each.mean for each in found], label=role, color=colour, linewidth=1.6)
        low, high = [each.low for each in found], [each.high for each in found]
        axes.fill_between(updates, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("update")
    axes.legend(ncols=2, fontsize=8)
