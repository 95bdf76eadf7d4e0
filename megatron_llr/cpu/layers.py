"""Layers that Megatron has for GPUs alone, from its own parts that run anywhere.

With them the CPU route takes the flags of a cluster's job: sequence parallelism, context
parallelism, multi-latent attention, the alltoall dispatcher of experts. Imports megatron; loaded by
`cpu/emulation.py`, after its other substitutions.
"""

import copy
from typing import Any

import megatron.core.models.backends as backends
import megatron.core.transformer.moe.moe_layer as moe_layer
import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from megatron_llr.errors import user_error


def substitute() -> None:
    """Put them where Megatron's local layer specs find them."""
    backend: Any = backends
    backend.DotProductAttention = CoreAttention
    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = _token_counts
    experts: Any = moe_layer
    experts.TELinear, experts.HAVE_TE = ReplicatedLinear, True
    _substitute_norms()


def true_order(pieces: int, cp_size: int) -> list[int]:
    """Where each piece of the sequence lies in what context-parallel ranks hold, one after another.

    Rank r of `cp_size` holds the pieces r and 2 * cp_size - 1 - r of 2 * cp_size equal ones
    (`megatron.core.utils.get_batch_on_this_cp_rank`).

    Args:
        pieces: 2 * cp_size.
        cp_size: number of context-parallel ranks.
    """
    held = [piece for rank in range(cp_size) for piece in (rank, pieces - 1 - rank)]
    return sorted(range(pieces), key=held.__getitem__)


class CoreAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's unfused attention, which alone knows neither context parallelism nor MLA.

    Under context parallelism every rank gathers keys and values of the whole sequence. Under
    multi-latent attention keys and values have widths of their own.
    """

    def __init__(
        self,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        if config.context_parallel_size > 1 and self.scale_mask_softmax.window_size is not None:
            raise user_error(
                "--window-size with --context-parallel-size is not there on the CPU",
                got=f"--window-size {config.window_size}",
                allowed="context parallelism or sliding windows",
                remedy="leave one of them out, or run on a GPU",
            )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend from this rank's queries to the whole sequence.

        Args:
            query: [positions here, batch, heads, width].
            key: [positions here, batch, groups, width].
            value: [positions here, batch, groups, width].
            attention_mask: [batch, 1, positions here, all positions], true where not to look; None
                for the causal one.
            args: passed on.
            kwargs: passed on.

        Returns:
            [positions here, batch, heads * width of a value].
        """
        if self.config.context_parallel_size > 1:
            key, value = self._whole(key), self._whole(value)
            if attention_mask is None:
                attention_mask = self._causal_mask(query.shape[0])
        out: torch.Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return out

    def _whole(self, mine: torch.Tensor) -> torch.Tensor:
        """From positions here to all, in their true order; backward sums the gradients."""
        ranks = self.config.context_parallel_size
        held: torch.Tensor = gather_from_sequence_parallel_region(
            mine.contiguous(), group=self.pg_collection.cp
        )
        pieces = held.view(2 * ranks, -1, *held.shape[1:])
        return pieces[true_order(2 * ranks, ranks)].reshape(held.shape)

    def _causal_mask(self, positions_here: int) -> torch.Tensor:
        ranks, rank = self.config.context_parallel_size, self.pg_collection.cp.rank()
        everywhere = torch.arange(positions_here * ranks)
        pieces = everywhere.view(2 * ranks, -1)
        here = pieces[[rank, 2 * ranks - 1 - rank]].reshape(-1, 1)
        return (everywhere > here)[None, None]


class ReplicatedLinear(torch.nn.Linear):
    """What Transformer Engine's linear is to latent experts: one weight, whole on every rank.

    Args:
        input_size: columns of the weight.
        output_size: rows of the weight.
        config: of the model.
        init_method: draws the weight in place.
        bias: whether there is one.
        kwargs: what says that no rank has a part of it.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool,
        **kwargs: Any,
    ) -> None:
        assert kwargs.pop("parallel_mode") == "duplicated"
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)
        for name, parameter in self.named_parameters():
            if name == "bias":
                torch.nn.init.zeros_(parameter)
            marked: Any = parameter
            marked.allreduce = True
            marked.sequence_parallel = config.sequence_parallel
            marked.tensor_model_parallel = False

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Project [..., input_size] to [..., output_size]; no bias is left to add."""
        return super().forward(hidden), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """For a checkpoint: the same on all tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group_if_none(None),
            dp_cp_group=metadata["dp_cp_group"],
        )


def _substitute_norms() -> None:
    """Let torch's norms take part in sequence parallelism, as a GPU's norms do.

    Each tensor-parallel rank norms its own tokens; Megatron sums the gradients of weights that say
    so.
    """
    plain: Any = WrappedTorchNorm.__new__

    def new(cls: Any, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        without = copy.copy(config)
        without.sequence_parallel = False
        norm: torch.nn.Module = plain(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)


def _token_counts(counts: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What the alltoall dispatcher of experts sends, as numpy arrays.

    Megatron turns counts that come from a GPU into arrays, and passes them on to collectives; those
    that are on the CPU already it leaves as tensors, which collectives refuse.
    """
    return counts.numpy() if as_numpy and torch.is_tensor(counts) else counts
