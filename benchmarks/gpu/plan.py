"""The cases: what each runs, its time limit, and what it needs."""

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.gpu.fp8_recipes import RECIPES

# hidden, ffn, heads, blocks of arXiv 2605.22297's models, and the micro-batch that is trained here.
SHAPES = {
    "60M": (768, 1512, 12, 6, 16),
    "350M": (1024, 2736, 16, 24, 8),
    "1B": (2048, 5461, 32, 24, 4),
    "3B": (2560, 6848, 32, 32, 2),
}
# The same cases on CPU. Their times mean nothing.
TOY_SHAPES = {
    "60M": (64, 96, 4, 2, 2),
    "350M": (64, 112, 4, 2, 2),
    "1B": (80, 95, 4, 2, 2),  # an odd FFN width, as the real one
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
TE = "transformer_engine"
EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type allgather"
).split()
DETERMINISTIC = ("--deterministic-mode",)
UNIFORM = ("--llr-policy", "uniform")
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
LATENT = "--multi-latent-attention --q-lora-rank 64 --kv-lora-rank 64".split()


@dataclass(frozen=True)
class Case:
    """One process of a run.

    Attributes:
        name: in the table.
        function: module:function below `benchmarks.gpu`; returns JSON values.
        seconds: its time limit.
        arguments: of the function.
        needs: a package without which the case is skipped, or None.
        recipe: an FP8 recipe; on a card without it the case is skipped. None if it needs none.
        gpu_only: whether the case is skipped on CPU.
    """

    name: str
    function: str
    seconds: int
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    recipe: str | None = None
    gpu_only: bool = False


def model_flags(size: str, iterations: int, *, toy: bool) -> list[str]:
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
    recipe: str | None = None,
    **how: Any,
) -> Case:
    own = [] if toy else ENGINE if engine else LOCAL
    iterations = min(iterations, 6) if toy else iterations
    flags = [*model_flags(size, iterations, toy=toy), *own, *more]
    return Case(
        name,
        "training:train",
        seconds,
        {"flags": flags, **how},
        TE if engine else None,
        recipe,
    )


def _pair(name: str, size: str, *more: str, **how: Any) -> list[Case]:
    """Plain Megatron and `uniform`, 12 updates each with deterministic kernels."""
    exact = (*more, *DETERMINISTIC)
    return [
        _training(f"{name}-plain", size, 12, 60, *exact, extension=False, **how),
        _training(f"{name}-uniform", size, 12, 60, *exact, *UNIFORM, **how),
    ]


def _fp8_pair(recipe: str, *, toy: bool) -> list[Case]:
    # Sides of FP8 products are multiples of 16, or of the sides of a recipe's blocks.
    width = () if toy or recipe not in ("blockwise", "mxfp8") else ("--ffn-hidden-size", "2816")
    flags = ("--fp8-format", "hybrid", "--fp8-recipe", recipe, *width)
    return _pair(f"te-fp8-{recipe}", "350M", *flags, toy=toy, engine=True, recipe=recipe)


def _in_turn(size: str, iterations: int, seconds: int, *, toy: bool, **how: Any) -> Case:
    return _training(f"in-turn-{size}", size, iterations, seconds, toy=toy, in_turn=True, **how)


def _measured(size: str, *, toy: bool) -> Case:
    arguments = {"model": "tiny" if toy else size, "repeats": 1 if toy else 2}
    return Case(f"measure-{size}", "spectra:measure_all_blocks", 90, arguments)


def cases(*, toy: bool) -> list[Case]:
    """All cases, the most informative first: those after the end of the budget are not run.

    Args:
        toy: for a dry run on CPU: toy sizes, without time limits.
    """
    grouped = () if toy else ("--moe-grouped-gemm",)  # not available on CPU
    experts = {"blocks": 2, "experts": 4} if toy else {}
    optimizer = {"blocks": 2, "hidden": 64, "ffn": 96, "heads": 4} if toy else {}
    gather = ("--fp8-format", "hybrid", "--fp8-recipe", "delayed", "--fp8-param-gather")
    overlap = (*DETERMINISTIC, *OVERLAP, *UNIFORM)
    updates = (*DETERMINISTIC, *UNIFORM, "--llr-log-relative-update")
    kernels = {size: {"model": size} for size in ("60M", "350M")}
    hyperball = {
        size: {"model": "tiny", "repeats": 2} if toy else kernels[size] for size in kernels
    }
    engine: dict[str, Any] = {"toy": toy, "engine": True}
    all_cases = [
        *_pair("bf16", "60M", toy=toy),
        _in_turn("60M", 40, 60, toy=toy),
        Case("optimizers", "optimizers:probe_and_time", 60, optimizer),
        Case("many-experts", "expert_steps:time_expert_steps", 90, experts),
        *_pair("te-bf16", "60M", **engine),
        *_fp8_pair("delayed", toy=toy),
        *_pair("te-moe", "60M", *EXPERTS, *grouped, **engine),
        *_pair("te-mla", "60M", *LATENT, **engine),
        _training("te-fp8-gather", "350M", 12, 60, *gather, recipe="delayed", **engine),
        _in_turn("350M", 24, 60, toy=toy),
        *(
            Case(f"inner-step-{size}", "kernels:time_inner_steps", 60, each, gpu_only=True)
            for size, each in kernels.items()
        ),
        *(
            Case(f"hyperball-step-{size}", "kernels:time_hyperball_steps", 60, each)
            for size, each in hyperball.items()
        ),
        Case("logged-step-350M", "kernels:time_logged_step", 60, kernels["350M"], gpu_only=True),
        *(_measured(size, toy=toy) for size in SHAPES),
        Case(
            "sharded", "spectra:compare_sharded", 60, {"sides": [96, 64] if toy else [5461, 2048]}
        ),
        _training("overlap-uniform", "60M", 12, 60, *overlap, toy=toy),
        _in_turn("1B", 16, 75, toy=toy, measured=False),
        _in_turn("3B", 12, 90, toy=toy, measured=False),
        *(case for recipe in RECIPES[1:] for case in _fp8_pair(recipe, toy=toy)),
        Case("self-test", "self_test_case:run_self_test", 90, {"only": "dp" if toy else ""}),
        _training("updates-uniform", "60M", 12, 60, *updates, toy=toy),
    ]
    # A dry run only checks that cases run, however slow and busy the machine is.
    return [replace(case, seconds=24 * 3600) for case in all_cases] if toy else all_cases
