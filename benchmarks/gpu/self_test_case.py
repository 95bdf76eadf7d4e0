"""`tools/self_test.py` on one rank."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_llr.tools.self_test import cli


def run_self_test(device: str, *, only: str) -> dict[str, Any]:
    """Run the self-test.

    Args:
        device: cuda or cpu.
        only: names of layouts, separated by commas; empty for the default ones.

    Returns:
        result (ok or FAILED); note, with the checks that are not ok; the JSON document.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "self_test.json"
        sys.argv[1:] = ["--device", device, "--only", only, "--out", str(out)]
        cli.main()
        document = json.loads(out.read_text())
    notes = [
        f"{row['layout']} {name} {cell['status']}: {cell['note']}"
        for row in document["rows"]
        for name, cell in row["cells"].items()
        if cell["status"] != "ok"
    ]
    checked = f"layouts: {len(document['rows'])}"
    return {
        "result": document["result"],
        "note": "; ".join([checked, *document["problems"], *notes]),
        "document": document,
    }
