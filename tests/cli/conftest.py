"""Settings of the tests of tools."""

from megatron_llr.megatron import launch

# Before a test imports megatron: forks of this process run tools without a GPU.
launch.prepare_device(["--llr-device", "cpu"])
