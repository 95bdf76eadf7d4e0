"""Run Megatron's own training loop many times in one process, and keep what a run computed.

For tests and `tools/self_test.py`. Call `launch.prepare_device` before this module is imported.
"""

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import megatron.training.training as training_module
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings import rotary_pos_embedding as rotary
from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import destroy_global_vars

from megatron_llr.controller import LayerwiseController
from megatron_llr.megatron import job
from megatron_llr.megatron.flags import add_llr_arguments
from megatron_llr.megatron.memoized import memoize
from megatron_llr.megatron.seams import use_prebuilt_dataset_helpers


@dataclass
class TrainingRun:
    """What one run of the loop computed.

    Attributes:
        losses: of every update, on ranks that have the loss.
        model: model chunks of this rank.
        optimizer: Megatron's optimizer.
        scheduler: Megatron's scheduler.
    """

    losses: list[float] = field(default_factory=list)
    model: list[torch.nn.Module] = field(default_factory=list)
    optimizer: Any = None
    scheduler: Any = None

    @property
    def controller(self) -> LayerwiseController:
        """The controller of a run with the extension."""
        controller: LayerwiseController = self.scheduler._controller
        return controller

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's parameters, by chunk and name."""
        return {
            f"{index}.{name}": parameter.detach().clone()
            for index, chunk in enumerate(self.model)
            for name, parameter in unwrap_model(chunk).named_parameters()
        }

    def sharded_state(self) -> dict[str, Any]:
        """The model's part of a Megatron checkpoint, for `megatron.core.dist_checkpointing`."""
        return {
            f"model{index}": unwrap_model(chunk).sharded_state_dict()
            for index, chunk in enumerate(self.model)
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Load the weights of `sharded_state`, before any update.

        Raises:
            RuntimeError: if weights are missing or unknown, except Transformer Engine's scales.
        """
        for index, chunk in enumerate(self.model):
            result = unwrap_model(chunk).load_state_dict(state[f"model{index}"], strict=False)
            names = [name for name in result.missing_keys if "_extra_state" not in name]
            names += result.unexpected_keys
            if names:
                raise RuntimeError(f"megatron_llr: weights missing or unknown: {', '.join(names)}")
        self.optimizer.reload_model_params()


type OnUpdate[Run: TrainingRun] = Callable[[Run, int, bool], None]
"""(run, number of the update, whether it is done) -> nothing."""


@functools.cache
def prepare_process() -> None:
    """Make repeated runs possible and fast. Once per process, later calls do nothing."""
    memoize()
    _release_replicas()


def _release_replicas() -> None:
    """Let gradient hooks reference their model weakly.

    In fp32 the distributed optimizer's shards have an autograd graph that ends at those hooks.
    Python's garbage collector does not follow it and would never free the model and its groups.
    """
    plain = DistributedDataParallel._make_backward_post_hook

    def make_hook(self: Any, parameter: torch.nn.Parameter) -> Callable[..., None]:
        model = weakref.proxy(self)
        reference = weakref.ref(parameter)
        return lambda *unused: plain(model, reference())(*unused)

    DistributedDataParallel._make_backward_post_hook = make_hook


def destroy_groups() -> None:
    """Destroy the process groups of earlier runs: each has threads of its own."""
    mpu.destroy_model_parallel()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _release_graphs(model: list[torch.nn.Module]) -> None:
    """Drop references to the last forward pass, so that model and groups can be freed.

    Token dispatchers of experts keep tensors of it, whose autograd graph references the model.
    """
    for module in (module for chunk in model for module in chunk.modules()):
        for holder in (module, getattr(module, "token_dispatcher", None)):
            for name, value in list(vars(holder).items() if holder is not None else ()):
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(holder, name, value.detach())


def _reset_megatron() -> None:
    """Reset Megatron's globals, so that the next run starts as in a new process.

    The groups stay until the next run: the caller may still measure the model.
    """
    # A cache of the last results keeps every rotary embedding, and with it a group.
    for embedding in (rotary.RotaryEmbedding, yarn.YarnRotaryEmbedding):
        for method in vars(embedding).values():
            getattr(method, "cache_clear", lambda: None)()
    destroy_global_vars()
    mpu.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    # They keep process groups, also on ranks without such layers in a later run.
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
    # Transformer Engine collects the scales of all FP8 layers of the process.
    engine: Any = sys.modules.get("transformer_engine.pytorch.fp8")
    if engine is not None:
        engine.FP8GlobalStateManager.reset()


@contextlib.contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["pretrain_gpt_llr.py", *words]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _recorded[Run: TrainingRun](
    run: Run, on_update: OnUpdate[Run] | None, on_built: Callable[[Run], None] | None
) -> Iterator[None]:
    """Record losses, model and optimizer of the run inside this context."""
    training = training_module
    names = ("training_log", "setup_model_and_optimizer", "train_step")
    before = {name: getattr(training, name) for name in names}

    @functools.wraps(before["training_log"])
    def training_log(loss_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "lm loss" in loss_dict:
            value = loss_dict["lm loss"]
            run.losses.append(float(value if value.ndim == 0 else value[0] / value[1]))
        return before["training_log"](loss_dict, *args, **kwargs)

    @functools.wraps(before["setup_model_and_optimizer"])
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        built = before["setup_model_and_optimizer"](*args, **kwargs)
        run.model, run.optimizer, run.scheduler = built
        if on_built is not None:
            on_built(run)
        return built

    @functools.wraps(before["train_step"])
    def train_step(*args: Any, **kwargs: Any) -> Any:
        assert on_update is not None
        update = get_args().curr_iteration + 1
        on_update(run, update, False)
        result = before["train_step"](*args, **kwargs)
        on_update(run, update, True)
        return result

    if on_update is not None:
        training.train_step = train_step
    training.training_log = training_log
    training.setup_model_and_optimizer = setup_model_and_optimizer
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(training, name, original)


@contextlib.contextmanager
def _stopped_early(words: Sequence[str]) -> Iterator[None]:
    """Megatron ends the process at --exit-interval; here the caller continues."""
    try:
        yield
    except SystemExit as stopped:
        if "--exit-interval" not in words or stopped.code != 0:
            raise


def run_once[Run: TrainingRun](
    run: Run,
    words: Sequence[str],
    *,
    llr: bool,
    on_update: OnUpdate[Run] | None = None,
    on_built: Callable[[Run], None] | None = None,
) -> None:
    """Train once. Enter on all ranks.

    Args:
        run: where to record.
        words: command line of `pretrain_gpt_llr.py`, without its name.
        llr: with the extension, or plain Megatron.
        on_update: called before and after every update.
        on_built: called when model and optimizer are built, before the first measurement.
    """
    prepare_process()
    destroy_groups()
    try:
        with _command_line(words), _recorded(run, on_update, on_built), _stopped_early(words):
            if llr:
                job.pretrain()
            else:
                use_prebuilt_dataset_helpers()
                job.run_loop(parse_and_validate_args(extra_args_provider=add_llr_arguments))
    finally:
        _release_graphs(run.model)
        _reset_megatron()
