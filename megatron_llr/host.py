"""The one place that knows where Megatron keeps its names.

Every other module of this package takes Megatron's classes and functions from here, so a new
release of the host is met in one file. Importing this module imports megatron; on a machine without
a GPU `megatron_llr.runtime.cpu.enable` comes first.
"""

from importlib import metadata
from typing import Any

import torch
from packaging.version import Version

from megatron_llr.errors import user_error
from megatron_llr.packages import check_transformer_engine

# The loop, the optimizer wrappers and the checkpoint layout that this package was tried on.
SUPPORTED = (Version("0.19"), Version("0.20"))


def check_version() -> None:
    """Refuse a megatron-core outside the window that this package was tried on.

    Raises:
        ValueError: naming the version found and the versions allowed.
    """
    try:
        found = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or not SUPPORTED[0] <= Version(Version(found).base_version) < SUPPORTED[1]:
        raise user_error(
            "unsupported megatron-core",
            got=found,
            allowed=f">={SUPPORTED[0]},<{SUPPORTED[1]}",
            remedy="pip install 'megatron-core>=0.19,<0.20' under Python 3.12 or newer",
        )


check_version()
check_transformer_engine()

import megatron.core.datasets.utils as datasets_utils  # noqa: E402
import megatron.training.training as training_module  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (  # noqa: E402
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
)
from megatron.core.datasets.indexed_dataset import (  # noqa: E402
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)
from megatron.core.dist_checkpointing.serialization import load_common_state_dict  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.num_microbatches_calculator import (  # noqa: E402
    destroy_num_microbatches_calculator,
)
from megatron.core.optimizer import (  # noqa: E402
    DistributedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer import (  # noqa: E402
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.rerun_state_machine import (  # noqa: E402
    destroy_rerun_state_machine,
    get_rerun_state_machine,
)
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.core.transformer.multi_token_prediction import (  # noqa: E402
    get_mtp_ranks,
    mtp_on_this_rank,
)
from megatron.core.transformer.pipeline_parallel_layer_layout import (  # noqa: E402
    PipelineParallelLayerLayout,
)
from megatron.core.utils import (  # noqa: E402
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    unwrap_model,
)
from megatron.training import get_args, get_timers, pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    ArgumentGroupFactory,
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args  # noqa: E402
from megatron.training.global_vars import (  # noqa: E402
    destroy_global_vars,
    get_tensorboard_writer,
    get_wandb_writer,
)
from megatron.training.utils import (  # noqa: E402
    get_blend_and_blend_per_split,
    is_first_or_last_pipeline_stage,
)

__all__ = [
    "SUPPORTED",
    "ArgumentGroupFactory",
    "BlendedMegatronDatasetBuilder",
    "ChainedOptimizer",
    "DType",
    "DistributedOptimizer",
    "FP32Optimizer",
    "Float16OptimizerWithFloat16Params",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "MegatronOptimizer",
    "MockGPTDataset",
    "ModelType",
    "OptimizerConfig",
    "OptimizerParamScheduler",
    "PipelineParallelLayerLayout",
    "ProcessGroupCollection",
    "build_tokenizer",
    "check_version",
    "confirm_dataset_helpers",
    "datasets_utils",
    "destroy_global_vars",
    "destroy_num_microbatches_calculator",
    "destroy_rerun_state_machine",
    "get_args",
    "get_attr_wrapped_model",
    "get_batch_on_this_cp_rank",
    "get_batch_on_this_tp_rank",
    "get_blend_and_blend_per_split",
    "get_megatron_optimizer",
    "get_mtp_ranks",
    "get_rerun_state_machine",
    "get_tensorboard_writer",
    "get_timers",
    "get_wandb_writer",
    "gpt_config_from_args",
    "hybrid_config_from_args",
    "is_first_or_last_pipeline_stage",
    "load_common_state_dict",
    "mpu",
    "mtp_on_this_rank",
    "parse_and_validate_args",
    "parse_args",
    "pretrain",
    "pretrain_cfg_container_from_args",
    "print_rank_0",
    "training_module",
    "unwrap_model",
]


def versions() -> dict[str, str]:
    """What must be the same on every node, beside torch."""
    return {"the version of megatron-core": metadata.version("megatron-core")}


def process_groups(model_chunks: list[torch.nn.Module]) -> Any:
    """Process groups of the model: its own collection, else Megatron's global one."""
    groups = getattr(unwrap_model(model_chunks[0]), "pg_collection", None)
    return groups or ProcessGroupCollection.use_mpu_process_groups()


def confirm_dataset_helpers() -> None:
    """Fail with an import error, not in the middle of training, if the C++ helpers are missing."""
    import megatron.core.datasets.helpers_cpp  # noqa: F401


def synchronize_parameters(model_chunks: list[torch.nn.Module], optimizer: Any) -> None:
    """Finish an overlapped parameter gather, so that every rank's weights are whole.

    With `--overlap-param-gather` the gather of updated weights runs during the next forward pass;
    until then a rank holds new values for its own shard alone. Costs no extra communication: the
    next forward pass finds the gather already done. Enter on all ranks.
    """
    overlapping = [
        chunk
        for chunk in model_chunks
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False)
    ]
    if overlapping:
        with torch.no_grad():
            training_module.force_param_sync(overlapping, optimizer)
