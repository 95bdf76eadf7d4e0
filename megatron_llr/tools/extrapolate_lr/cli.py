"""The command line of the extrapolation; `tools/extrapolate_lr.py` calls it."""

import argparse
import math
import sys
from pathlib import Path

from megatron_llr.errors import input_error
from megatron_llr.tools.extrapolate_lr.observations import COLUMNS

_DESCRIPTION = """Extrapolate the optimal learning rate to more training tokens.

Reads finished grids of tools/compare.py, or CSV files with a row per run. Per number of tokens the
optimal rate is the minimum of a parabola in its logarithm. A power law and a quadratic in the
logarithm of the tokens are fitted to the optimal rates and to the optimal effective rates. Writes
extrapolation.txt, optima.csv, fits.csv and extrapolation.png."""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("inputs", nargs="+", type=Path, help="folders of grids, or CSV files")
    made.add_argument("--tokens", type=float, help="number of tokens to predict the rate for")
    made.add_argument(
        "--out", type=Path, default=Path("extrapolation"), help="output folder (extrapolation)"
    )
    made.add_argument(
        "--window",
        type=float,
        default=3.0,
        help="fit the rates within this factor of the best one (3)",
    )
    made.add_argument(
        "--best-batch",
        action="store_true",
        help="take the batch size of least loss at each rate, not each batch size by itself",
    )
    made.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME=COLUMN",
        help=f"names in the CSV files that differ from {', '.join(COLUMNS)}",
    )
    made.add_argument(
        "--policy", nargs="+", default=[], help="only these values of the column policy"
    )
    return made


def _run(given: argparse.Namespace) -> str:
    """Analyze the inputs and write the files; returns the table."""
    names = dict(pair.partition("=")[::2] for pair in given.columns)
    if set(names) - set(COLUMNS) or not all(names.values()):
        raise input_error(
            f"--columns {' '.join(given.columns)} must be pairs such as tokens=D, with a name of "
            f"{', '.join(COLUMNS)} on the left."
        )
    for flag, value, least in (("--tokens", given.tokens, 0), ("--window", given.window, 1)):
        if value is not None and not (math.isfinite(value) and value > least):
            raise input_error(f"{flag} is {value:g}. It must be a finite number above {least}.")
    # SciPy and matplotlib take long to import.
    from megatron_llr.tools.extrapolate_lr import analysis, observations, report_files

    every = observations.read_series(given.inputs, names)
    present = sorted({series.policy for series in every})
    if absent := sorted(set(given.policy) - set(present)):
        raise input_error(
            f"--policy {' '.join(absent)} is not in the input. It has {', '.join(present)}."
        )
    chosen = [series for series in every if not given.policy or series.policy in given.policy]
    if given.best_batch:
        chosen = analysis.best_batches(chosen)
    results = [analysis.extrapolate(each, given.window, given.tokens) for each in chosen]
    analysis.require_fits(results)
    text = report_files.report_text(results, given.tokens)
    report_files.write_files(given.out, results, given.tokens, text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        print(_run(given))
    except BrokenPipeError:
        raise
    except ImportError as missing:
        print(
            f"megatron_llr: {missing}. The fits need NumPy, SciPy and matplotlib: "
            "pip install 'megatron-llr[compare]'",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError) as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0
