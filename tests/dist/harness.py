"""Train the small model of the tests in Megatron's own loop, many times in one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_llr.megatron import launch

launch.prepare_device(["--llr-device", "cpu"])

from megatron_llr.measurement.transfers import assemble_matrix, read_shard  # noqa: E402
from megatron_llr.megatron.catalog import build_catalog  # noqa: E402
from megatron_llr.megatron.repeated_runs import (  # noqa: E402
    TrainingRun,
    destroy_groups,
    prepare_process,
    run_once,
)
from megatron_llr.ranks import gather_objects  # noqa: E402

__all__ = ["MODEL", "Run", "destroy_groups", "train"]

prepare_process()

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
class Run(TrainingRun):
    """A run, with what tests ask about."""

    @property
    def multipliers(self) -> dict[str, float]:
        """Multipliers of the next update."""
        return self.controller.multipliers

    @property
    def alphas(self) -> dict[str, float]:
        """Exponents of the last measurement."""
        return self.controller.alphas

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


def train(
    *flags: str,
    llr: bool = True,
    tied: bool = False,
    model: str | None = None,
    on_update: Callable[[Run, int, bool], None] | None = None,
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
    if model is None:
        described = [*MODEL]
        described += [] if "--multi-latent-attention" in extra else _GROUPED_QUERIES
        described += [] if tied else ["--untie-embeddings-and-output-weights"]
    else:
        described = model.split()
    words = [*launch.CPU_FLAGS, *described, *DATA, *TRAINING, *(LLR if llr else []), *extra]
    run_once(run, words, llr=llr, on_update=on_update, on_built=on_built)
    run.losses = next((losses for losses in gather_objects(run.losses)[::-1] if losses), [])
    return run
