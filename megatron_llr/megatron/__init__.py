"""Everything that knows Megatron: its flags, model, optimizers, scheduler and training loop.

Importing any module of this folder checks the installed versions first. On a machine without a GPU,
`megatron_llr.megatron.launch.prepare_device` comes before any module that imports megatron.
"""

from megatron_llr.megatron.packages import check_transformer_engine
from megatron_llr.megatron.versions import check_version

check_version()
check_transformer_engine()
