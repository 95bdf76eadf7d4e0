"""Run Megatron's own training loop, many times in one process, and keep what tests ask about."""

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.megatron import launch

launch.prepare_device(["--llr-device", "cpu"])

import megatron.training.training as training_module  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.models.common.embeddings import (  # noqa: E402
    rotary_pos_embedding as rotary,
)
from megatron.core.models.common.embeddings import (  # noqa: E402
    yarn_rotary_pos_embedding as yarn,
)
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.core.rerun_state_machine import destroy_rerun_state_machine  # noqa: E402
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training import get_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.global_vars import destroy_global_vars  # noqa: E402

from megatron_llr.controller import LayerwiseController  # noqa: E402
from megatron_llr.measurement.transfers import assemble_matrix, read_shard  # noqa: E402
from megatron_llr.megatron import job  # noqa: E402
from megatron_llr.megatron.catalog import build_catalog  # noqa: E402
from megatron_llr.ranks import gather_objects  # noqa: E402
from tests.dist.memo import remember  # noqa: E402

remember()


def _hold_no_replica() -> None:
    """Let a gradient's hook find its model, not keep it.

    In fp32 the distributed optimizer's shards have a graph that ends at those hooks; Python's
    collector does not see through it and would never free the model, nor its groups.
    """
    plain = DistributedDataParallel._make_backward_post_hook

    def make_hook(self: Any, parameter: torch.nn.Parameter) -> Callable[..., None]:
        model = weakref.proxy(self)
        held = weakref.ref(parameter)
        return lambda *unused: plain(model, held())(*unused)

    DistributedDataParallel._make_backward_post_hook = make_hook


_hold_no_replica()

MODEL = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 192 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --swiglu --normalization RMSNorm "
    "--position-embedding-type rope --disable-bias-linear --vocab-size 250"
).split()

DATA = (
    "--mock-data --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 4 "
    "--micro-batch-size 1 --global-batch-size 2"
).split()

# Megatron refuses it beside --multi-latent-attention.
_GROUPED_QUERIES = "--group-query-attention --num-query-groups 2".split()

TRAINING = (
    "--train-iters 8 --lr 2e-3 --min-lr 2e-4 --lr-warmup-iters 2 --lr-decay-style cosine "
    "--weight-decay 0.1 --clip-grad 1.0 --split 99,1,0 --eval-iters 0 --eval-interval 100 "
    "--log-interval 1 --distributed-timeout-minutes 2 --ckpt-format torch_dist "
    "--dist-ckpt-strictness assume_ok_unexpected"
).split()

VOCAB_SIZE = 250

# Two measurements within the run, a ramp that is under way at iteration 4, a window that ends.
LLR = "--llr-interval 4 --llr-ramp-iters 3 --llr-active-fraction 0.75".split()


@dataclass
class Run:
    """What one run of the loop left in memory."""

    losses: list[float] = field(default_factory=list)
    model: list[torch.nn.Module] = field(default_factory=list)
    optimizer: Any = None
    scheduler: Any = None

    @property
    def controller(self) -> LayerwiseController:
        """The controller of a run with the extension."""
        found: LayerwiseController = self.scheduler._controller
        return found

    @property
    def multipliers(self) -> dict[str, float]:
        """Multipliers of the next update."""
        return self.controller.multipliers

    @property
    def alphas(self) -> dict[str, float]:
        """Exponents of the last measurement."""
        return self.controller.alphas

    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters of this rank, cloned, by chunk and name."""
        return {
            f"{index}.{name}": parameter.detach().clone()
            for index, chunk in enumerate(self.model)
            for name, parameter in unwrap_model(chunk).named_parameters()
        }

    def whole_weights(
        self,
        vocab_size: int = VOCAB_SIZE,
        instead: Mapping[int, torch.nn.Parameter] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Every logical matrix of the model, whole, on every rank.

        Args:
            vocab_size: rows of embedding and head that count.
            instead: id of a parameter -> one of its shape whose values are taken.
        """
        found: dict[str, torch.Tensor] = {}
        for shard in build_catalog(self.model, vocab_size=vocab_size).shards:
            if instead is not None:
                shard = replace(shard, parameter=instead[id(shard.parameter)])
            pieces: list[Any] = [None] * len(shard.ranks)
            dist.all_gather_object(
                pieces, read_shard(shard).contiguous().reshape(-1), group=shard.group
            )
            parts = zip(pieces, shard.placements, strict=True)
            if not shard.split:
                parts = iter([(pieces[0], shard.placements[0])])
            chosen = list(parts)
            found[shard.matrix] = assemble_matrix(
                [piece for piece, _ in chosen],
                [placement for _, placement in chosen],
                shard.rows,
                shard.columns,
            ).float()
        merged: dict[str, torch.Tensor] = {}
        for other in gather_objects(found):
            merged.update(other)
        return merged


OnUpdate = Callable[[Run, int, bool], None]
"""(run, update, whether it is done) -> nothing."""


def drop_groups() -> None:
    """Destroy the process groups of earlier runs: each holds threads of its own."""
    mpu.destroy_model_parallel()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _forget_graphs(model: list[torch.nn.Module]) -> None:
    """Let go of the last forward pass, so that the model and its groups can be freed.

    Dispatchers of experts keep tensors of it; through its graph, which Python's collector does not
    see, those keep the model.
    """
    for module in (module for chunk in model for module in chunk.modules()):
        for holder in (module, getattr(module, "token_dispatcher", None)):
            for name, value in list(vars(holder).items() if holder is not None else ()):
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(holder, name, value.detach())


def clean_up() -> None:
    """Forget Megatron's globals, so that the next run begins as in a new process.

    The groups stay until the next run: a test may still measure the model that was trained.
    """
    # A cache of its last answers keeps every rotary embedding, and that a group.
    for embedding in (rotary.RotaryEmbedding, yarn.YarnRotaryEmbedding):
        for method in vars(embedding).values():
            getattr(method, "cache_clear", lambda: None)()
    destroy_global_vars()
    mpu.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    # They keep process groups, on ranks that a later run may leave without such layers.
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()


@contextlib.contextmanager
def _command_line(flags: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["pretrain_gpt_llr.py", *launch.CPU_FLAGS, *flags]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _recorded(
    run: Run, on_update: OnUpdate | None, on_built: Callable[[Run], None] | None
) -> Iterator[None]:
    """Keep losses, model and optimizer of the run that happens inside."""
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
def _stop(flags: list[str]) -> Iterator[None]:
    """Megatron leaves the process at --exit-interval; here the test goes on."""
    try:
        yield
    except SystemExit as stopped:
        if "--exit-interval" not in flags or stopped.code != 0:
            raise


def _train_plain() -> None:
    """Megatron's loop without the extension: the control of every comparison."""
    job.use_prebuilt_dataset_helpers()
    job.run_loop(parse_and_validate_args(extra_args_provider=job.add_llr_arguments))


def train(
    *flags: str,
    llr: bool = True,
    tied: bool = False,
    model: str | None = None,
    on_update: OnUpdate | None = None,
    on_built: Callable[[Run], None] | None = None,
) -> Run:
    """Train the small model; flags given here come last and so win.

    Args:
        flags: further flags, each string may hold several.
        llr: with the extension, or plain Megatron.
        tied: whether the head is the embedding.
        model: all flags of another model, instead of the small one's.
        on_update: called before and after every update, with the number of the update.
        on_built: called when model and optimizer stand, before the first measurement.

    Returns:
        The run; losses are the same on every rank.
    """
    extra = [word for text in flags for word in text.split()]
    run = Run()
    drop_groups()
    try:
        if model is None:
            described = [*MODEL]
            described += [] if "--multi-latent-attention" in extra else _GROUPED_QUERIES
            described += [] if tied else ["--untie-embeddings-and-output-weights"]
        else:
            described = model.split()
        line = [*described, *DATA, *TRAINING, *(LLR if llr else []), *extra]
        with _command_line(line), _recorded(run, on_update, on_built), _stop(extra):
            if llr:
                job.pretrain()
            else:
                _train_plain()
    finally:
        _forget_graphs(run.model)
        clean_up()
    run.losses = next((losses for losses in gather_objects(run.losses)[::-1] if losses), [])
    return run
