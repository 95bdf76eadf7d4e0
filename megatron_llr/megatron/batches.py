"""The pretraining job on `megatron.training.pretrain`: batches, loss, datasets.

The megatron-core wheel has the training loop but no script that calls it. This module is the part
of such a script that GPTModel and HybridModel share. It follows Megatron-LM's own entry points.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import megatron.core.datasets.utils as datasets_utils
import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_llr.errors import input_error
from megatron_llr.megatron.data_splits import empty_splits
from megatron_llr.ranks import together

Batch = dict[str, torch.Tensor | None]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]

# Seed for the order of the samples of --llr-fixed-validation; any constant works.
_VALIDATION_SEED = 1234

# A loss above this many times the largest of the first hundred is a spike, as in Megatron-LM's own
# entry points.
_SPIKY_LOSS_FACTOR = 10

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def _layout() -> Any:
    """The layout of --pipeline-model-parallel-layout; None without the flag."""
    args = get_args()
    if args.pipeline_model_parallel_layout is None:
        return None
    return PipelineParallelLayerLayout.from_str(
        args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    )


def _predicts_ahead_here(vp_stage: int | None) -> bool:
    """Whether this stage has layers of multi-token prediction, which need tokens and labels."""
    here: bool = mtp_on_this_rank(
        layout=_layout(),
        mtp_num_layers=get_args().mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )
    return here


def _next_batch(
    data_iterator: Iterator[Any] | None, vp_stage: int | None, micro_batch_size: int
) -> Batch:
    """The batch of this microbatch on this rank; tensors of shape [micro batch, sequence].

    Under context parallelism [micro batch, sequence / ranks]: an early and a late part for each
    rank. Stages in the middle of the pipeline need no batch and get None for every key.
    """
    if not _uses_batch_here(vp_stage):
        return dict.fromkeys(_BATCH_KEYS)
    args = get_args()
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        loaded = next(data_iterator)
        batch = {
            key: loaded[key].cuda(non_blocking=True) if loaded.get(key) is not None else None
            for key in _BATCH_KEYS
        }
    received: Batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_ahead_here(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    mine: Batch = get_batch_on_this_cp_rank(
        {key: received[key] for key in _BATCH_KEYS},
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
    )
    return mine


def _masked_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses under the mask, their number, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    args, rerun = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, reject in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            rerun.validate_result(
                result=loss,
                rejection_func=reject,
                message=f"{name} in the local forward loss",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(
                rerun.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1).to(loss.dtype)])}
    return loss, num_tokens, report


def forward_step(
    data_iterator: Iterator[Any] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, LossFunction]:
    """Forward one microbatch; the loss function is returned for Megatron to call.

    Args:
        data_iterator: batches, if this stage uses any.
        model: model chunk, wrapped or not.
        return_schedule_plan: return a plan of the computation instead of running it; Megatron sets
            this with --overlap-moe-expert-parallel-comm.

    Returns:
        Token losses of shape [micro batch, sequence] on the last stage, else hidden states, and
        the function that turns them into (sum of losses, number of tokens, log report).
    """
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    size = args.micro_batch_size if model.training else args.eval_micro_batch_size
    batch = _next_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), size)
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    # Megatron calls the loss only on the last stage, which has the mask.
    return output, partial(_masked_loss, cast(torch.Tensor, batch["loss_mask"]))


def _uses_batch_here(vp_stage: int | None) -> bool:
    at_an_end: bool = is_first_or_last_pipeline_stage(vp_stage)
    return at_an_end or _predicts_ahead_here(vp_stage)


def datasets_provider(
    train_valid_test_num_samples: list[int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Megatron's GPT datasets for training, validation and test, from the parsed flags.

    Raises:
        ValueError: if a split that the run reads has too little data.
    """
    args = get_args()
    train_samples, valid_samples, test_samples = train_valid_test_num_samples
    once = args.eval_iters * args.eval_global_batch_size
    if args.llr_fixed_validation:
        valid_samples = once
    sizes = [train_samples, valid_samples, test_samples]
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    empty = empty_splits(args, blend, blend_per_split, sizes)
    build = partial(_build, empty=empty)

    def reads_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and _uses_batch_here(vp_stage)

    if not args.llr_fixed_validation:
        train, valid, test = build(sizes, args.seed, reads_here)
        return train, valid, test
    train, _, test = build(sizes, args.seed, reads_here)
    if once == 0:
        return train, None, test
    # One training sample, because Megatron's builder needs every split that has data.
    _, valid, _ = build([1, once, 0], _VALIDATION_SEED, reads_here)
    return train, None if valid is None else RepeatedDataset(valid, once), test


def _build(
    num_samples: list[int], seed: int, reads_here: Callable[[], bool], empty: list[int]
) -> list[Any]:
    """Megatron's datasets per split, None if this rank reads none; `seed` sets their order.

    The splits of `empty` are not built.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split is not None:
        blend_per_split = [
            None if index in empty else each for index, each in enumerate(blend_per_split)
        ]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=together(
            partial(_sequences_per_dataset, args.per_dataset_sequences_path)
        ),
    )
    if config.split_matrix is not None:
        config.split_matrix = [
            None if index in empty else bounds for index, bounds in enumerate(config.split_matrix)
        ]
    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(dataset_class, num_samples, reads_here, config)
    built: list[Any] = builder.build()
    return built


def _sequences_per_dataset(path: str | None) -> dict[str, list[int]] | None:
    """Content of --per-dataset-sequences-path: data path -> numbers of sequences and documents."""
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            sequences: dict[str, list[int]] = json.load(file)
    except (OSError, ValueError) as broken:
        raise input_error(
            f"--per-dataset-sequences-path {path} cannot be read: {type(broken).__name__}: "
            f"{broken}. It must be a JSON object of data paths, each with its numbers of sequences "
            "and documents. Fix the file, or leave the flag out: the .idx files have the same "
            "numbers."
        ) from broken
    return sequences


class RepeatedDataset(torch.utils.data.Dataset[Any]):
    """The first samples of a dataset, repeated: every evaluation uses the same ones.

    Args:
        dataset: at least `period` samples.
        period: samples of one evaluation.
    """

    # Tells Megatron's loader to use the validation batch size.
    index_split = datasets_utils.Split.valid

    def __init__(self, dataset: Any, period: int) -> None:
        self._dataset, self._period = dataset, period

    def __len__(self) -> int:
        # Unlimited: a resumed run starts after all samples of its earlier evaluations, which may be
        # more than its own --eval-interval and --eval-iters need.
        return sys.maxsize

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index % self._period]


# Megatron reads this attribute: the datasets are built on several ranks, not on one.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Ranks of one pipeline that hold word embeddings.

    The first stage, with tied embeddings also the last, and the stages of multi-token prediction.
    """
    args = get_args()
    layers_ahead = SimpleNamespace(
        mtp_num_layers=args.mtp_num_layers, pipeline_model_parallel_layout=_layout()
    )
    holders = {pipeline_ranks[0], *get_mtp_ranks(pipeline_ranks, layers_ahead)}
    if not args.untie_embeddings_and_output_weights:
        holders.add(pipeline_ranks[-1])
    return sorted(holders)
