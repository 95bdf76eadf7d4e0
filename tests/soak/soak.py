"""A job that is disturbed at random moments and restarted by the same command, again and again.

Usage: python tests/soak/soak.py [--seconds 3600] [--kills 0] [--seed 0] [--folder FOLDER]

Two gloo ranks under torchrun train 100 updates, saved every 20. Each round starts such a job, ends
it at random moments in random ways (SIGKILL to a rank or to torchrun, SIGTERM, a full disk; at
times the log folder is removed before), restarts it, and lets it finish at last. Then weights,
optimizer, multipliers and CSV files must be those of an undisturbed job, to the bit, and no process
may be left. Ends after the first round that passes --seconds or --kills. Exit code 1 after a
difference; the folder is then kept.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cli.jobs import (
    FLAGS,
    LAST,
    Ended,
    Job,
    Step,
    after,
    fill_disk,
    iteration,
    kill_launcher,
    kill_rank,
    remove_logs,
    terminate,
)

KILLS_PER_ROUND = 5
ENDS = {
    "rank 0": kill_rank(0),
    "rank 1": kill_rank(1),
    "launcher": kill_launcher,
    "SIGTERM": terminate,
    "full disk": fill_disk,
}


@dataclass
class Soak:
    """Counts what happened.

    Attributes:
        choose: source of all random choices.
        counts: kind of disturbance -> how often.
        starts: starts of a job, without the undisturbed one.
    """

    choose: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    def moment(self, job: Job) -> tuple[int, float, str]:
        """Update after which something happens, seconds after it, and when that is in words."""
        update = self.choose.randint(job.last_saved + 1, LAST - 1)
        when = self.choose.random()
        if when < 0.15:
            return 0, self.choose.uniform(0, 30), "in the first 30 s"
        if when < 0.4:
            # Saves come after multiples of 20 and take about a second.
            update = min(-(-update // 20) * 20, LAST) - 1
            return update, self.choose.uniform(0, 1), f"near the save after update {update + 1}"
        return update, self.choose.uniform(0, 0.2), f"after update {update}"

    def disturb(self, job: Job, gone: int) -> tuple[Ended, int]:
        """One start and its end; also the last update whose rows may be missing from now on."""
        kind = self.choose.choice(list(ENDS))
        update, delay, when = self.moment(job)
        steps = [Step(after(update), ENDS[kind], delay)]
        removed = bool(update) and self.choose.random() < 0.3
        if removed:
            at = self.choose.randint(job.last_saved, update)
            steps.insert(0, Step(after(at), remove_logs))
        saved = job.last_saved
        ended = job.disturb(*steps)
        self.starts += 1
        reached = max(map(iteration, ended.lines))
        # What a restart repeats is written again.
        gone = min(gone, saved)
        if removed and len(ended.lines) > 1:
            gone = max(gone, self._last_lost(ended))
            self.counts["log removed"] += 1
        if ended.acted:
            self.counts[kind] += 1
        print(
            f"{kind} {when}{', log removed before' if removed else ''}: reached {reached}, "
            f"code {ended.code}, saved {job.last_saved}",
            flush=True,
        )
        if kind == "full disk" and ended.acted and reached < LAST:
            assert ended.code != 0, "a job on a full disk ended with code 0"
        return ended, gone

    @staticmethod
    def _last_lost(ended: Ended) -> int:
        """The last update before the log began again; the last one of all if it did not.

        It may begin again more than once, since files are created while the folder is removed.
        """
        reached, lost = 0, None
        for line in ended.lines:
            reached = max(reached, iteration(line))
            if "learning_rates.csv was removed or emptied" in line:
                lost = reached
        return reached if lost is None else lost

    def round(self, folder: Path, unbroken: Job, kills: int) -> list[str]:
        """A job from start to end with so many disturbances; what differs at the end."""
        job, gone = Job(folder, "", flags=unbroken.flags), 0
        for _ in range(kills):
            ended, gone = self.disturb(job, gone)
            if job.last_saved == LAST:
                break
        if job.last_saved < LAST:
            gone = min(gone, job.last_saved)
            self.starts += 1
            ended = job.disturb()
            if ended.code != 0:
                return [f"the last start ended with code {ended.code}", *ended.lines[-30:]]
        return job.differences(unbroken, gone_up_to=gone)


def main() -> int:
    """Run rounds until the time or the number of kills has passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600, help="no new round after this")
    parser.add_argument("--kills", type=int, default=0, help="nor after so many ends; 0: no limit")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (0)")
    parser.add_argument("--folder", type=Path, help="for the jobs (a temporary folder)")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    begun = time.monotonic()
    soak = Soak(random.Random(given.seed))
    flags = list(FLAGS)
    flags[flags.index("--save-interval") + 1] = "20"
    unbroken = Job(folder / "unbroken", "", flags=flags)
    unbroken.finish()
    rounds, differing = 0, []
    while not differing and time.monotonic() - begun < given.seconds:
        kills = sum(soak.counts[kind] for kind in ENDS)
        if given.kills and kills >= given.kills:
            break
        most = min(KILLS_PER_ROUND, given.kills - kills) if given.kills else KILLS_PER_ROUND
        rounds += 1
        differing = soak.round(folder / f"round-{rounds}", unbroken, most)
        print(f"round {rounds}: {differing or 'the same'}", flush=True)
        if not differing:
            shutil.rmtree(folder / f"round-{rounds}")
    kills = sum(soak.counts[kind] for kind in ENDS)
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{kills} kills, {soak.starts} starts, {rounds} rounds, {minutes:.0f} min, seed "
        f"{given.seed}: {dict(soak.counts)}; {'DIFFERENT' if differing else 'bitwise the same'}"
    )
    if differing:
        print(f"see {folder}", file=sys.stderr)
        return 1
    if not given.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
