"""CPU versions of layers that Megatron has only for GPUs, built from its local layers.

With them the CPU route supports the flags of a GPU job: sequence parallelism, context parallelism,
multi-latent attention, the alltoall dispatcher of experts. Imports megatron, so `cpu/emulation.py`
imports it after its other substitutions.
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

from megatron_llr.errors import input_error


def substitute() -> None:
    """Make Megatron's local layer specs use the layers of this module."""
    backend: Any = backends
    backend.DotProductAttention = CoreAttention
    dispatcher: Any = token_dispatcher

    def token_counts(counts: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron converts only counts on a GPU to arrays for its collectives. Counts on the CPU
        # would stay tensors, which the collectives reject.
        return counts.numpy() if as_numpy and torch.is_tensor(counts) else counts

    dispatcher.maybe_move_tensor_to_cpu = token_counts
    experts: Any = moe_layer
    experts.TELinear, experts.HAVE_TE = ReplicatedLinear, True
    create_norm: Any = WrappedTorchNorm.__new__

    def new(cls: Any, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # Torch's norms support sequence parallelism: each tensor-parallel rank normalizes its own
        # tokens. Megatron sums the gradients of weights with this attribute.
        without_sp = copy.copy(config)
        without_sp.sequence_parallel = False
        norm: torch.nn.Module = create_norm(cls, without_sp, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)


def true_order(chunks: int, cp_size: int) -> list[int]:
    """Position of each chunk of the sequence in the concatenation over context-parallel ranks.

    Rank r of `cp_size` holds the chunks r and 2 * cp_size - 1 - r of 2 * cp_size equal ones
    (`megatron.core.utils.get_batch_on_this_cp_rank`).

    Args:
        chunks: 2 * cp_size.
        cp_size: number of context-parallel ranks.
    """
    held = [chunk for rank in range(cp_size) for chunk in (rank, chunks - 1 - rank)]
    return sorted(range(chunks), key=held.__getitem__)


class CoreAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's unfused attention, with support for context parallelism and MLA.

    With context parallelism every rank gathers keys and values of the whole sequence. With
    multi-latent attention keys and values may have different widths.
    """

    def __init__(
        self,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        without_cp = copy.copy(config)
        without_cp.context_parallel_size = 1
        super().__init__(without_cp, *args, **kwargs)
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        if config.context_parallel_size > 1 and self.scale_mask_softmax.window_size is not None:
            raise input_error(
                f"--window-size {config.window_size} is not supported together with "
                f"--context-parallel-size {config.context_parallel_size} on the CPU. Remove one of "
                "the two flags, or run on a GPU"
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
        """Attention of this rank's queries to the whole sequence.

        Args:
            query: [local positions, batch, heads, width].
            key: [local positions, batch, groups, width].
            value: [local positions, batch, groups, width].
            attention_mask: [batch, 1, local positions, all positions], true at masked positions.
                None for the causal mask.
            args: arguments of Megatron's attention.
            kwargs: arguments of Megatron's attention.

        Returns:
            [local positions, batch, heads * width of a value].
        """
        ranks = self.config.context_parallel_size
        if ranks > 1:
            key, value = self._gather_sequence(key), self._gather_sequence(value)
            if attention_mask is None:
                rank = self.pg_collection.cp.rank()
                positions = torch.arange(query.shape[0] * ranks)
                chunks = positions.view(2 * ranks, -1)
                local = chunks[[rank, 2 * ranks - 1 - rank]].reshape(-1, 1)
                attention_mask = (positions > local)[None, None]
        out: torch.Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
        return out

    def _gather_sequence(self, local: torch.Tensor) -> torch.Tensor:
        """All positions in order from those of this rank; backward sums the gradients."""
        ranks = self.config.context_parallel_size
        gathered: torch.Tensor = gather_from_sequence_parallel_region(
            local.contiguous(), group=self.pg_collection.cp
        )
        chunks = gathered.view(2 * ranks, -1, *gathered.shape[1:])
        return chunks[true_order(2 * ranks, ranks)].reshape(gathered.shape)


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer with the whole weight on every rank; replaces Transformer Engine's (MoE).

    Args:
        input_size: columns of the weight.
        output_size: rows of the weight.
        config: of the model.
        init_method: initializes the weight in place.
        bias: whether it has a bias.
        kwargs: `parallel_mode`, which must be "duplicated"; others are ignored.
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
        """Project [..., input_size] to [..., output_size]. None: the bias has been added."""
        return super().forward(hidden), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """State for a checkpoint, equal on all tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group_if_none(None),
            dp_cp_group=metadata["dp_cp_group"],
        )
