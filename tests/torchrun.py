"""Run the multi-rank tests: pytest under one torchrun launch, rank 0's report on the terminal.

Usage: python tests/torchrun.py WORLD_SIZE [pytest arguments]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Launch, then print what rank 0 said, and what the others said if they failed alone."""
    world_size, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as logs:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", world_size]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        # Ranks write to files, so that their reports do not run into one another.
        launch += ["--redirects", "3", "--log-dir", logs, "-m", "pytest", "-q", "--durations", "8"]
        launch += ["-p", "no:cacheprovider", *(arguments or ["tests/dist"])]
        done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)
        reports = sorted(Path(logs).glob("**/stdout.log"))
        for report in reports:
            first = report.parent.name == "0"
            if first or done.returncode:
                lines = report.read_text(errors="replace").splitlines()
                print("\n".join(lines[-60 if first else -25 :]))
        if done.returncode and not reports:
            print(done.stderr[-4000:])
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
