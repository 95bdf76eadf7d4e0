"""Everything that depends on Megatron: its flags, model, optimizers, scheduler and training loop.

Importing any module of this folder checks the installed versions first. On a machine without a GPU,
call `megatron_llr.megatron.launch.prepare_device` before any module imports megatron.
"""

from megatron_llr.megatron.packages import check_transformer_engine
from megatron_llr.megatron.versions import check_version

check_version()
check_transformer_engine()
