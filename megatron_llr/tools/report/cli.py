"""The command line of `tools/report_run.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_llr.telemetry import plots
from megatron_llr.telemetry.read_logs import last_measurement, last_role_table
from megatron_llr.tools.compare.results import VALIDATION, scalars

_DESCRIPTION = """Figures and a summary of a finished or running job, from its log folder.

Reads the CSV files of --llr-log-dir, for any value of --llr-log-matrices, and TensorBoard events in
RUN_DIR/tensorboard if there are any. Writes multipliers.png and learning_rates.png to RUN_DIR, and
relative_updates.png if the run had --llr-log-relative-update.
"""


def validation_loss(folder: Path) -> str | None:
    """The last validation loss in the run's TensorBoard events, or None."""
    points = scalars(folder).get(VALIDATION)
    if not points:
        return None
    last = max(points)
    return f"validation loss {points[last]:.4f} after update {last}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures, then print the table per role and the validation loss."""
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder given as --llr-log-dir")
    folder = parser.parse_args(arguments).run_dir
    try:
        measured = last_measurement(folder)
        plots.multiplier_map(folder, folder / "multipliers.png")
        plots.learning_rate_lines(folder, folder / "learning_rates.png")
        plots.relative_update_lines(folder, folder / "relative_updates.png")
        loss = validation_loss(folder / "tensorboard")
    except (OSError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"\nafter the measurement before update {measured.iteration}:")
    print(last_role_table(measured))
    if loss:
        print(loss)
    return 0
