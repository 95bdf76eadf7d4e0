"""The cases: what each runs, for how long at most, and what it needs to be there."""

from dataclasses import dataclass, field
from typing import Any

# hidden, ffn, heads, blocks of arXiv 2605.22297's models, and the micro-batch that is trained here.
SHAPES = {
    "60M": (768, 1512, 12, 6, 16),
    "350M": (1024, 2736, 16, 24, 8),
    "1B": (2048, 5461, 32, 24, 4),
    "3B": (2560, 6848, 32, 32, 2),
}
# The same cases on CPU: nothing here says how fast anything is.
TOY_SHAPES = {
    "60M": (64, 96, 4, 2, 2),
    "350M": (64, 112, 4, 2, 2),
    "1B": (80, 96, 4, 2, 2),
    "3B": (96, 112, 4, 2, 2),
}
# Megatron's fused kernels come with apex or Transformer Engine; none of these needs either.
LOCAL = (
    "--transformer-impl local --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
    "--no-gradient-accumulation-fusion --no-persist-layer-norm"
).split()
ENGINE = (
    "--transformer-impl transformer_engine --no-rope-fusion --no-bias-swiglu-fusion "
    "--no-bias-dropout-fusion --no-gradient-accumulation-fusion"
).split()
FP8 = "--fp8-format hybrid --fp8-recipe delayed".split()
# Recipe -> the compute capability that it needs: Hopper, Blackwell.
OTHER_RECIPES = {"tensorwise": (9, 0), "blockwise": (9, 0), "mxfp8": (10, 0)}
TE = "transformer_engine"
EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type allgather"
).split()
LATENT = "--multi-latent-attention --q-lora-rank 64 --kv-lora-rank 64".split()


@dataclass(frozen=True)
class Case:
    """One process of a run.

    Attributes:
        name: in the table.
        function: module:function below `benchmarks.gpu`; returns JSON values.
        seconds: at most.
        arguments: of the function.
        needs: a package without which the case is skipped, or None.
        capability: least compute capability of the GPU; below it the case is skipped.
    """

    name: str
    function: str
    seconds: int
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    capability: tuple[int, int] = (0, 0)


def training_flags(size: str, iterations: int, *, toy: bool) -> list[str]:
    """Megatron's flags of a model of one of the sizes, on mock data, in bf16."""
    hidden, ffn, heads, blocks, batch = (TOY_SHAPES if toy else SHAPES)[size]
    length, vocabulary = (32, 250) if toy else (1024, 32127)
    text = (
        f"--num-layers {blocks} --hidden-size {hidden} --ffn-hidden-size {ffn} "
        f"--num-attention-heads {heads} --seq-length {length} --max-position-embeddings {length} "
        "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
        "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
        f"--mock-data --tokenizer-type NullTokenizer --vocab-size {vocabulary} --num-workers 0 "
        f"--micro-batch-size {batch} --global-batch-size {batch} --train-iters {iterations} "
        "--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 "
        "--split 99,1,0 --eval-iters 0 --eval-interval 1000 --log-interval 1 --seed 1234 "
        "--bf16 --use-distributed-optimizer --distributed-timeout-minutes 2 --llr-active-iters 1"
    )
    return text.split()


def _training(
    name: str,
    size: str,
    iterations: int,
    seconds: int,
    *more: str,
    toy: bool,
    engine: bool = False,
    capability: tuple[int, int] = (0, 0),
    **how: Any,
) -> Case:
    own = [] if toy else ENGINE if engine else LOCAL
    iterations = min(iterations, 6) if toy else iterations
    flags = [*training_flags(size, iterations, toy=toy), *own, *more]
    return Case(
        name,
        "training:train",
        seconds,
        {"flags": flags, **how},
        TE if engine else None,
        capability,
    )


def cases(*, toy: bool) -> list[Case]:
    """All cases, the most telling first: where the budget ends, the rest is not run."""
    exact = ("--deterministic-mode",)
    uniform = ("--llr-policy", "uniform")
    overlap = ("--overlap-grad-reduce", "--overlap-param-gather")
    # One tensor for each expert of a layer, multiplied together; not there on CPU.
    grouped = () if toy else ("--moe-grouped-gemm",)
    shapes = TOY_SHAPES if toy else SHAPES

    def run(name: str, size: str, iterations: int, seconds: int, *more: str, **how: Any) -> Case:
        return _training(name, size, iterations, seconds, *more, toy=toy, **how)

    def pair(name: str, size: str, *more: str, **how: Any) -> list[Case]:
        return [
            run(f"{name}-plain", size, 12, 60, *exact, *more, extension=False, **how),
            run(f"{name}-uniform", size, 12, 60, *exact, *more, *uniform, **how),
        ]

    def in_turn(size: str, iterations: int, seconds: int, **how: Any) -> Case:
        return run(f"in-turn-{size}", size, iterations, seconds, in_turn=True, **how)

    def measured(size: str, seconds: float) -> Case:
        hidden, ffn, _, blocks, _ = shapes[size]
        sides = {"hidden": hidden, "ffn": ffn, "blocks": blocks}
        limit = {"seconds": 0.2 if toy else seconds}
        return Case(f"measure-{size}", "matrices:measure", 60, {**sides, **limit})

    def recipe(name: str, capability: tuple[int, int]) -> list[Case]:
        flags = ("--fp8-format", "hybrid", "--fp8-recipe", name)
        return pair(f"te-fp8-{name}", "350M", *flags, engine=True, capability=capability)

    experts = {"blocks": 2, "experts": 4} if toy else {}
    optimizer = {"blocks": 2, "hidden": 64, "ffn": 96, "heads": 4} if toy else {}
    return [
        *pair("bf16", "60M"),
        in_turn("60M", 40, 60),
        Case("optimizers", "stepping:compare", 60, optimizer),
        Case("many-experts", "stepping:many_experts", 60, experts),
        *pair("te-bf16", "60M", engine=True),
        # Sides of FP8 products are multiples of 16: 350M's are.
        *pair("te-fp8", "350M", *FP8, engine=True),
        *pair("te-moe", "60M", *EXPERTS, *grouped, engine=True),
        *pair("te-mla", "60M", *LATENT, engine=True),
        run("te-fp8-gather", "350M", 12, 60, *FP8, "--fp8-param-gather", engine=True),
        in_turn("350M", 24, 60),
        *(measured(size, 6) for size in SHAPES),
        Case("sharded", "matrices:sharded", 60, {"sides": [96, 64] if toy else [5461, 2048]}),
        run("overlap-uniform", "60M", 12, 60, *exact, *overlap, *uniform),
        in_turn("1B", 16, 75, measured=False),
        in_turn("3B", 12, 90, measured=False),
        *(case for each, least in OTHER_RECIPES.items() for case in recipe(each, least)),
        Case("self-test", "self_test:check", 90, {"only": "dp" if toy else ""}),
        run("updates-uniform", "60M", 12, 60, *exact, *uniform, "--llr-log-relative-update"),
    ]
