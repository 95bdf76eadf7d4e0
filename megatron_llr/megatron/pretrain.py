"""The program of `pretrain_gpt_llr.py`, for `torchrun -m megatron_llr.megatron.pretrain`."""

import multiprocessing

from megatron_llr.megatron import process_end

# Before torch is imported, which takes seconds. Spawned processes import the main module, and so
# this one, before they begin to work.
if multiprocessing.current_process().name == "MainProcess":
    process_end.end_with_launcher()
else:
    process_end.end_with_rank()

from torch.distributed.elastic.multiprocessing.errors import record

from megatron_llr.megatron import launch


@record
def main() -> None:
    """Choose the device, then train."""
    launch.main_arguments()
    # Imports megatron, which must not happen before the device is chosen.
    from megatron_llr.megatron import job

    try:
        job.pretrain()
    finally:
        job.shut_down()


if __name__ == "__main__":
    main()
