"""Rebinds three names in `megatron.training`, and restores them on exit."""

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import megatron.core.datasets.utils as datasets_utils
import megatron.training.training as training_module
import torch.distributed as dist
from megatron.training import get_args, print_rank_0
from megatron.training.global_vars import (
    get_tensorboard_writer,
    get_tokenizer,
    get_wandb_writer,
)

from megatron_llr.config import LLRConfig, flag, shared_settings
from megatron_llr.controller import LayerwiseController
from megatron_llr.errors import topology_error
from megatron_llr.megatron import library
from megatron_llr.megatron.assembly import name_weights, say
from megatron_llr.megatron.param_scheduler import LayerwiseParamScheduler
from megatron_llr.megatron.same_start import draw_weights
from megatron_llr.ranks import gather_objects, require_equal, together
from megatron_llr.script_config import ScriptConfig
from megatron_llr.telemetry.observer import Observer

# The parameters that the seams rely on, by the name that is rebound.
_EXPECTED = {
    "get_megatron_optimizer": ["config", "model_chunks"],
    "get_optimizer_param_scheduler": ["optimizer"],
    "setup_model_and_optimizer": ["model_type", "model_provider_func", "checkpointing_context"],
}


def tokenizer_vocab_size() -> int:
    """Tokens of the vocabulary, from the tokenizer that Megatron built.

    `args.vocab_size` is None with most tokenizers.
    """
    return int(get_tokenizer().vocab_size)


def _record_tokenizer() -> None:
    """Keep the tokenizer's size and end-of-document token in args, which a checkpoint contains.

    An exported model needs both. Megatron's own args have only the padded size.
    """
    args = get_args()
    args.llr_vocab_size = tokenizer_vocab_size()
    args.llr_eod_id = getattr(get_tokenizer(), "eod", None)


class _Seams:
    """Replacements of the rebound names during one run."""

    def __init__(self, config: LLRConfig, script: ScriptConfig) -> None:
        self.config = config
        self.script = script
        self.controller: LayerwiseController | None = None
        self._setup = training_module.setup_model_and_optimizer

    def get_megatron_optimizer(self, config: Any, model_chunks: Any, **kwargs: Any) -> Any:
        """Build Megatron's optimizer and its layer groups, as the library does."""
        # The first call of every rank that has a process group.
        seed = get_args().seed
        require_equal(
            {**shared_settings(self.script), "--seed": seed},
            lambda setting: f"give every rank the same {setting}",
        )
        _record_tokenizer()
        weights = name_weights(model_chunks, self.config, tokenizer_vocab_size())
        if self.script.same_start:
            together(lambda: draw_weights(model_chunks, weights.padded_shards, seed))
        return library.build_optimizer(config, weights, **kwargs)

    def scheduler(self, optimizer: Any, **kwargs: Any) -> LayerwiseParamScheduler:
        """Called where Megatron calls `OptimizerParamScheduler(optimizer, ...)`."""
        args = get_args()
        self.controller = library.make_controller(
            optimizer,
            # With --train-samples, Megatron has set it by now.
            total_updates=args.train_iters,
            observer=self._observer(args.log_interval),
        )
        return LayerwiseParamScheduler(optimizer, controller=self.controller, **kwargs)

    def setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's own set-up, which loads the weights; then prepare the controller."""
        built = self._setup(*args, **kwargs)
        assert self.controller is not None
        _, _, scheduler = built
        restored = together(scheduler.restore_controller)
        done, decoupled_lr = get_args().iteration, get_args().decoupled_lr
        if done > 0 and not restored:
            say(f"multipliers start from 1 at update {done + 1}: {self._without_state()}")
        if decoupled_lr is not None and self.config.policy != "uniform":
            say(
                f"--decoupled-lr {decoupled_lr} is the base learning rate of embedding and head, "
                f"which {flag('embedding')} {self.config.embedding} multiplies"
            )
        self.controller.prepare(done)
        if self.script.explain is not None:
            explanations = gather_objects(self.controller.explanation(self.script.explain))
            # A rank that steps the matrix knows the base learning rate.
            known = (each for each in explanations if each.base_rate is not None)
            print_rank_0(str(next(known, explanations[0])))
        if self.script.dry_run:
            print_rank_0(self.controller.describe())
            dist.barrier()
            raise SystemExit(0)
        return built

    def _without_state(self) -> str:
        """Why this run goes on from a checkpoint without the extension's state."""
        if self.config.reset_state:
            return f"{flag('reset_state')} ignores the extension's state"
        if get_args().no_load_optim:
            return "--no-load-optim loads neither Megatron's scheduler nor the extension's state"
        return "the checkpoint has no state of the extension"

    def _observer(self, log_interval: int) -> Observer:
        if self.script.dry_run:
            # A dry run only prints; the files of an earlier run are kept.
            silent = dataclasses.replace(self.config, log_dir=None)
            return library.make_observer(silent, log_interval=log_interval)
        # Megatron keeps its TensorBoard and W&B writers on the last rank, None elsewhere.
        return library.make_observer(
            self.config,
            tensorboard=get_tensorboard_writer(),
            wandb=get_wandb_writer(),
            wandb_step=_current_iteration,
            log_interval=log_interval,
        )


def _current_iteration() -> int:
    """The iteration that Megatron logs next; before the first, the loaded one, or 0."""
    args = get_args()
    # The training loop sets it at the start of an iteration, to the number of those before.
    before = getattr(args, "curr_iteration", None)
    return int(args.iteration if before is None else before + 1)


@contextlib.contextmanager
def installed(config: LLRConfig, script: ScriptConfig) -> Iterator[_Seams]:
    """Train with layerwise learning rates inside this context.

    Rebinds, in `megatron.training.training`: `get_megatron_optimizer`, `OptimizerParamScheduler`
    and `setup_model_and_optimizer`.

    Raises:
        RuntimeError: if the parameters of one of them are not those of Megatron 0.19.
    """
    for name, expected in _EXPECTED.items():
        parameters = list(inspect.signature(getattr(training_module, name)).parameters)
        if parameters[: len(expected)] != expected:
            raise topology_error(
                f"megatron.training.training.{name} has other parameters than in Megatron 0.19",
                got=", ".join(parameters),
                allowed=f"parameters that begin with {', '.join(expected)}",
                remedy="install megatron-core 0.19.x",
            )
    seams = _Seams(config, script)
    rebound = {
        "get_megatron_optimizer": seams.get_megatron_optimizer,
        "OptimizerParamScheduler": seams.scheduler,
        "setup_model_and_optimizer": seams.setup_model_and_optimizer,
    }
    before = {name: getattr(training_module, name) for name in rebound}
    for name, replacement in rebound.items():
        setattr(training_module, name, replacement)
    try:
        yield seams
    finally:
        for name, original in before.items():
            setattr(training_module, name, original)


def use_prebuilt_dataset_helpers() -> None:
    """Keep Megatron from calling make: the wheel has compiled C++ helpers and no Makefile.

    If they are missing, an import error comes before training.
    """
    datasets_utils.compile_helpers = lambda: importlib.import_module(
        "megatron.core.datasets.helpers_cpp"
    )
