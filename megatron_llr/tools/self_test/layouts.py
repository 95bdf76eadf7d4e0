"""The layouts that are checked: which of them a number of ranks allows, and Megatron's flags."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_llr.errors import input_error

_BF16 = "--bf16"
_SHARDED = f"{_BF16} --use-distributed-optimizer"
_OVERLAP = f"{_SHARDED} --overlap-grad-reduce --overlap-param-gather"
_ALL_TO_ALL = "--moe-token-dispatcher-type alltoall"
_FP8 = f"{_OVERLAP} --fp8-format hybrid --fp8-recipe"

DENSE, EXPERTS = "dense", "experts"


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    Attributes:
        name: by which `--only` selects it.
        model: DENSE or EXPERTS.
        precision: flags of precision, optimizer and token dispatcher.
        tensor: tensor-parallel size. With more than one rank also sequence parallel, if
            `sequence` is set.
        pipeline: pipeline-parallel size.
        virtual: virtual stages per pipeline rank; 1 is none.
        context: context-parallel size.
        experts: expert-parallel size.
        expert_tensor: expert-tensor-parallel size.
        sequence: whether tensor-parallel ranks are also sequence parallel.
        part_of: a larger layout that has the same kinds of parallelism and more. Where that fits,
            this one is checked only by name.
    """

    name: str
    model: str
    precision: str = ""
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    experts: int = 1
    expert_tensor: int = 1
    sequence: bool = False
    part_of: str = ""

    @property
    def smallest(self) -> int:
        """The smallest number of ranks that it fits; it fits every multiple."""
        dense = self.tensor * self.pipeline * self.context
        expert = self.experts * self.expert_tensor * self.pipeline
        # Both are powers of two.
        return max(dense, expert)

    @property
    def flags(self) -> list[str]:
        """Megatron's flags, in addition to the model's."""
        sizes = {
            "--tensor-model-parallel-size": self.tensor,
            "--pipeline-model-parallel-size": self.pipeline,
            "--num-virtual-stages-per-pipeline-rank": self.virtual,
            "--context-parallel-size": self.context,
            "--expert-model-parallel-size": self.experts,
        }
        words = [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
        if self.model == EXPERTS and self.tensor > 1:
            words += ["--expert-tensor-parallel-size", str(self.expert_tensor)]
        if self.sequence:
            words.append("--sequence-parallel")
        return [*words, *self.precision.split()]

    @property
    def fp8(self) -> bool:
        """Whether matrix products are in FP8."""
        return "--fp8-format" in self.precision


# The first layout of each model fits every number of ranks and saves the weights for all others.
# fp32 without a distributed optimizer: megatron-core 0.19.2 cannot load what that saves in fp32.
# Experts and context parallelism in bf16: Transformer Engine has few of those kernels in fp32.
LAYOUTS = (
    Layout("dp", DENSE),
    Layout("dp-overlap-bf16", DENSE, _OVERLAP),
    Layout("tp2", DENSE, tensor=2, part_of="tp4-sp-bf16"),
    Layout(
        "tp2-sp-overlap-bf16",
        DENSE,
        _OVERLAP,
        tensor=2,
        sequence=True,
        part_of="tp2-sp-pp2-overlap-bf16",
    ),
    Layout("pp2-bf16", DENSE, _BF16, pipeline=2, part_of="tp2-sp-pp2-overlap-bf16"),
    Layout("vpp2-overlap-bf16", DENSE, _OVERLAP, pipeline=2, virtual=2),
    Layout("cp2-distopt-bf16", DENSE, _SHARDED, context=2, part_of="tp2-sp-cp2-bf16"),
    Layout("tp4-sp-bf16", DENSE, _BF16, tensor=4, sequence=True),
    Layout(
        "tp2-sp-pp2-overlap-bf16",
        DENSE,
        _OVERLAP,
        tensor=2,
        sequence=True,
        pipeline=2,
        part_of="tp2-sp-pp2-cp2-distopt-bf16",
    ),
    Layout(
        "tp2-sp-cp2-bf16",
        DENSE,
        _BF16,
        tensor=2,
        sequence=True,
        context=2,
        part_of="tp2-sp-pp2-cp2-distopt-bf16",
    ),
    Layout(
        "tp2-sp-pp2-cp2-distopt-bf16",
        DENSE,
        _SHARDED,
        tensor=2,
        sequence=True,
        pipeline=2,
        context=2,
    ),
    Layout("experts-distopt-bf16", EXPERTS, _SHARDED),
    Layout(
        "ep2-overlap-bf16",
        EXPERTS,
        f"{_OVERLAP} {_ALL_TO_ALL}",
        experts=2,
        part_of="ep8-overlap-bf16",
    ),
    Layout(
        "tp2-sp-ep2-bf16",
        EXPERTS,
        _BF16,
        tensor=2,
        sequence=True,
        experts=2,
        part_of="tp2-sp-pp2-ep2-distopt-bf16",
    ),
    Layout(
        "tp2-sp-ep2-etp2-distopt-bf16",
        EXPERTS,
        f"{_SHARDED} {_ALL_TO_ALL}",
        tensor=2,
        sequence=True,
        experts=2,
        expert_tensor=2,
    ),
    Layout(
        "tp2-sp-pp2-ep2-distopt-bf16",
        EXPERTS,
        _SHARDED,
        tensor=2,
        sequence=True,
        pipeline=2,
        experts=2,
    ),
    Layout("ep8-overlap-bf16", EXPERTS, f"{_OVERLAP} {_ALL_TO_ALL}", experts=8),
    Layout("fp8-delayed", DENSE, f"{_FP8} delayed"),
    Layout("fp8-tensorwise-tp2-sp", DENSE, f"{_FP8} tensorwise", tensor=2, sequence=True),
)

# 16 columns a head: keys and values have 64 rows, enough to be measured. All sides are multiples of
# 16, as FP8 needs. The padded vocabulary is 256 at every tensor-parallel size.
_MODEL = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 192 --num-attention-heads 8 "
    "--group-query-attention --num-query-groups 4 --seq-length 32 --max-position-embeddings 32 "
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0.1 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 250 --make-vocab-size-divisible-by 32"
).split()

_EXPERTS = (
    "--num-experts 8 --moe-ffn-hidden-size 64 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type allgather --moe-layer-freq ([0,1]*2)"
).split()

UPDATES = 6
SAVED_AT = 4
"""The update after which a run is saved: inside the ramp of the updates 3, 4 and 5."""

# Without warm-up, so that the first update is not 0. The second measurement is before update 3.
_TRAINING = (
    f"--train-iters {UPDATES} --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1 "
    "--clip-grad 1.0 --split 99,1,0 --eval-iters 0 --eval-interval 100 --log-interval 1 "
    "--micro-batch-size 1 --num-workers 0 --deterministic-mode --ckpt-format torch_dist "
    "--dist-ckpt-strictness assume_ok_unexpected"
).split()
LLR = "--llr-interval 3 --llr-ramp-iters 2 --llr-active-iters 3".split()


def training_flags(layout: Layout, ranks: int) -> list[str]:
    """Flags of the model, its data and its training on a layout, for any device.

    Args:
        layout: one that fits.
        ranks: of the job. Every data-parallel replica has at least two micro batches.
    """
    model = [*_MODEL, *(_EXPERTS if layout.model == EXPERTS else [])]
    return [*model, *_TRAINING, "--global-batch-size", str(2 * ranks), *layout.flags]


def fitting(ranks: int) -> list[Layout]:
    """All layouts that a number of ranks allows, in the order of the table."""
    return [layout for layout in LAYOUTS if ranks % layout.smallest == 0]


def selected(ranks: int, only: Sequence[str] = ()) -> list[Layout]:
    """The layouts to check, preceded by those whose weights they load.

    Args:
        ranks: of the job.
        only: names; empty selects the default ones.

    Raises:
        ValueError: for a name that does not exist or does not fit.
    """
    fit = fitting(ranks)
    names = [layout.name for layout in fit]
    for name in only:
        if name in names:
            continue
        known = next((layout for layout in LAYOUTS if layout.name == name), None)
        reason = (
            "does not exist"
            if known is None
            else f"needs a multiple of {known.smallest} ranks, and this job has {ranks}"
        )
        raise input_error(f"--only: layout {name} {reason}. Allowed here: {', '.join(names)}.")
    if not only:
        return [layout for layout in fit if layout.part_of not in names]
    chosen = [layout for layout in fit if layout.name in only]
    models = {layout.model for layout in chosen}
    sources = {next(layout.name for layout in fit if layout.model == model) for model in models}
    return [layout for layout in fit if layout in chosen or layout.name in sources]
