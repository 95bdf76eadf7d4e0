"""Let ranks end with their launcher, and helper processes with their rank.

Imports neither torch nor megatron: these calls come first in a process, while it imports them.
"""

import ctypes
import os
import select
import signal
import sys
import threading

# prctl(2): the signal that Linux sends to a process when its parent ends.
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Let this rank end, by SIGTERM, when torchrun does.

    If torchrun is killed with SIGKILL, its ranks would train on, and a restarted job would write
    the same checkpoints and logs. No effect without torchrun or outside Linux. If torchrun ended
    before this call, the rank waits for its process group until Megatron's timeout.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_rank() -> None:
    """Let this process, which a rank spawned, end by SIGTERM when the rank does.

    Megatron's checkpoint worker and its queue would outlive a rank that was killed. No effect where
    the operating system has no pidfd_open(2).
    """
    try:
        # Of the process: prctl would watch the thread that spawned this one.
        rank = os.pidfd_open(os.getppid())
    except (AttributeError, OSError):
        return
    poll = select.poll()
    poll.register(rank, select.POLLIN)

    def wait() -> None:
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end_with_rank", daemon=True).start()
