"""The script with a fault: rank 1 dies, or stands still, in the middle of a measurement.

Usage: faulty.py SIGNAL MEASUREMENT <flags of pretrain_gpt_llr.py>

SIGNAL is what rank 1 sends to itself (`SIGKILL`, `SIGSTOP`) in the measurement of that number, from
1, where the ranks share their records.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# The second as pretrain_gpt_llr.py does, for processes that a rank spawns.
from megatron_llr.measurement import measure  # noqa: E402
from megatron_llr.megatron import pretrain  # noqa: E402, F401


def main() -> None:
    """Prepare the fault, then run the script."""
    _, name, number, *flags = sys.argv
    sys.argv = ["pretrain_gpt_llr.py", *flags]
    share, entered = measure.all_gather_rows, [0]

    def faulty(*args: Any) -> Any:
        entered[0] += 1
        if entered[0] == int(number):
            os.kill(os.getpid(), signal.Signals[name])
        return share(*args)

    if os.environ["RANK"] == "1":
        measure.all_gather_rows = faulty
    else:
        # torchrun ends the others when one has died; here they may say what they saw first.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))
    runpy.run_path(str(ROOT / "pretrain_gpt_llr.py"), run_name="__main__")


if __name__ == "__main__":
    main()
