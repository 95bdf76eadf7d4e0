"""Settings of the tests of tools."""

import signal

from megatron_llr.megatron import launch

# Before a test imports megatron: forks of this process run tools without a GPU.
launch.prepare_device(["--llr-device", "cpu"])
# A shell starts background jobs with SIGINT ignored, which the tools would inherit and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
