"""One case in its own process: python -m benchmarks.gpu.case_process CASE.json RESULT.json."""

import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu.fp8_recipes import why_unavailable
from megatron_llr.output import replaced_file


def main() -> None:
    """Call the function of the case and write what it returns.

    The result is {"result": ...}, or {"unavailable": why the card cannot run the case}.
    """
    # A training run parses its own flags from sys.argv.
    given, target = sys.argv[1:]
    case = json.loads(Path(given).read_text())
    reason = why_unavailable(case["recipe"], case["device"]) if case["recipe"] else ""
    if reason:
        answer = {"unavailable": reason}
    else:
        module, function = case["function"].split(":")
        run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        answer = {"result": run(case["device"], **case["arguments"])}
    with replaced_file(Path(target)) as partial:
        partial.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Without waiting for process groups and data loaders, which have no more work.
    os._exit(0)
