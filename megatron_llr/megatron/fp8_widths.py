"""Checks that all sides of the weights that FP8 products read are multiples of its block.

Transformer Engine refuses other sides in the first forward pass, with an error that names no flag
(`assert_dim_for_fp8_exec` in transformer_engine/pytorch/utils.py).
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_llr.errors import input_error

# As megatron.core.fp8_utils.get_fp8_align_size.
_MULTIPLES = {"mxfp8": 32}
_DEFAULT_MULTIPLE = 16
# Product of all but the last dimension of an input.
_TOKENS = {"mxfp8": 32}
_DEFAULT_TOKENS = 8


class Side(NamedTuple):
    """One side of a weight on one rank: (value * factor + rest) / ranks.

    Attributes:
        flag: that changes it.
        value: of the flag.
        factor: of the value.
        ranks: that divide the side.
        rest: the part that does not depend on the flag.
    """

    flag: str
    value: int
    factor: int = 1
    ranks: int = 1
    rest: int = 0

    def length(self) -> float:
        """Of the side on one rank."""
        return (self.value * self.factor + self.rest) / self.ranks

    def fits(self, multiple: int) -> bool:
        """Whether FP8 products can read it."""
        return self.length() % multiple == 0


def multiple_of(recipe: str) -> int:
    """What sides must be multiples of, for a value of --fp8-recipe."""
    return _MULTIPLES.get(recipe, _DEFAULT_MULTIPLE)


def check_fp8_widths(args: Namespace) -> None:
    """Refuse, before anything is built, sides that FP8 products cannot have.

    Args:
        args: Megatron's flags after `validate_args`.

    Raises:
        ValueError: naming the flag and the nearest values that it can have.
    """
    if not args.fp8:
        return
    multiple = multiple_of(args.fp8_recipe)
    sides = list(_sides(args))
    for side in sides:
        if not side.fits(multiple):
            nearest = nearest_values([each for each in sides if each.flag == side.flag], multiple)
            _refuse(args, side, multiple, nearest)
    tokens = args.seq_length * args.micro_batch_size / args.context_parallel_size
    tokens /= args.tensor_model_parallel_size if args.sequence_parallel else 1
    needed = _TOKENS.get(args.fp8_recipe, _DEFAULT_TOKENS)
    if tokens % needed:
        raise input_error(
            f"--fp8-format {args.fp8} needs a multiple of {needed} tokens in a micro-batch on "
            f"each rank, which has {tokens:g}. Change --seq-length or --micro-batch-size."
        )


def nearest_values(sides: Sequence[Side], multiple: int) -> list[int]:
    """The largest smaller and the smallest larger value of a flag with which all sides fit.

    Args:
        sides: that have this flag and value.
        multiple: what they must be multiples of.
    """
    value = sides[0].value
    reach = range(1, 2 * multiple * max(side.ranks for side in sides) + 1)
    candidates = (
        (value - step for step in reach if step < value),
        (value + step for step in reach),
    )
    fitting = (
        next((v for v in each if all(s._replace(value=v).fits(multiple) for s in sides)), None)
        for each in candidates
    )
    return [value for value in fitting if value is not None]


def _refuse(args: Namespace, side: Side, multiple: int, nearest: Sequence[int]) -> None:
    ranks = f" on each of {side.ranks} tensor-parallel ranks" if side.ranks > 1 else ""
    use = f"Use {side.flag} {' or '.join(map(str, nearest))}, or leave" if nearest else "Leave"
    raise input_error(
        f"--fp8-format {args.fp8} with --fp8-recipe {args.fp8_recipe} needs weights whose sides "
        f"are multiples of {multiple}. {side.flag} {side.value} makes a side of "
        f"{side.length():g}{ranks}. {use} --fp8-format out."
    )


def _sides(args: Namespace) -> Iterator[Side]:
    """Every side of a weight in FP8 products, from the flag that is easiest to change."""
    ranks = args.tensor_model_parallel_size
    yield Side("--hidden-size", args.hidden_size)
    pattern = args.hybrid_layer_pattern
    if args.multi_latent_attention:
        yield from _latent_attention(args, ranks)
    elif not pattern or "*" in pattern:
        yield from _attention(args, ranks)
    if pattern and "M" in pattern:
        yield from _mamba(args, ranks)
    if _has_dense_mlp(args):
        yield Side("--ffn-hidden-size", args.ffn_hidden_size, ranks=ranks)
    if args.num_experts:
        experts = args.expert_tensor_parallel_size or ranks
        yield Side("--moe-ffn-hidden-size", args.moe_ffn_hidden_size, ranks=experts)
        shared = args.moe_shared_expert_intermediate_size
        if shared:
            yield Side("--moe-shared-expert-intermediate-size", shared, ranks=ranks)
        if args.moe_latent_size:
            yield Side("--moe-latent-size", args.moe_latent_size)


def _has_dense_mlp(args: Namespace) -> bool:
    if args.hybrid_layer_pattern:
        return "-" in args.hybrid_layer_pattern
    # --moe-layer-freq: 1 for experts in every block, N for every Nth, or a list of 0 and 1.
    return not args.num_experts or args.moe_layer_freq != 1


def _attention(args: Namespace, ranks: int) -> Iterator[Side]:
    heads, groups = args.num_attention_heads, args.num_query_groups
    groups = groups if args.group_query_attention else heads
    yield Side("--kv-channels", args.kv_channels, heads, ranks)
    yield Side("--kv-channels", args.kv_channels, heads + 2 * groups, ranks)


def _latent_attention(args: Namespace, ranks: int) -> Iterator[Side]:
    heads = args.num_attention_heads
    rope = args.qk_pos_emb_head_dim
    if args.q_lora_rank:
        yield Side("--q-lora-rank", args.q_lora_rank)
    yield Side("--kv-lora-rank", args.kv_lora_rank)
    yield Side("--qk-pos-emb-head-dim", rope, rest=args.kv_lora_rank)
    yield Side("--qk-head-dim", args.qk_head_dim, heads, ranks, heads * rope)
    yield Side("--qk-head-dim", args.qk_head_dim, heads, ranks, heads * args.v_head_dim)
    yield Side("--v-head-dim", args.v_head_dim, heads, ranks)


def _mamba(args: Namespace, ranks: int) -> Iterator[Side]:
    width, head = 2 * args.hidden_size, args.mamba_head_dim
    heads = args.mamba_num_heads or width // head
    states = 2 * args.mamba_num_groups * args.mamba_state_dim
    yield Side("--mamba-head-dim", head, heads, ranks)
    yield Side("--mamba-head-dim", head, 2 * heads, ranks, states + heads)
