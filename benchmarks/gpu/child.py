"""One case in a process of its own: python -m benchmarks.gpu.child CASE.json RESULT.json."""

import importlib
import json
import os
import sys
from pathlib import Path

from megatron_llr.output import replaced_file


def main() -> None:
    """Call the function that the case names; write what it returns."""
    # A training run parses its own flags from sys.argv.
    given, target = sys.argv[1:]
    case = json.loads(Path(given).read_text())
    module, function = case["function"].split(":")
    run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    result = run(case["device"], **case["arguments"])
    with replaced_file(Path(target)) as partial:
        partial.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Process groups and data loaders have nothing left to say, and may take their time over it.
    os._exit(0)
