"""What the extension adds to an iteration of the demo, outside measurements.

Usage: torchrun --nproc-per-node 2 benchmarks/iteration_overhead.py   (after `make demo`)

One run of the demo's model; iteration by iteration the layer groups are on or off, so both see
the same machine at the same time. Prints the ratio of the medians, the same for the optimizer's
step, and the difference of the steps as a share of an iteration, the least noisy of the three.
"""

import argparse
import statistics
import sys
import time
from typing import Any

from megatron_llr.megatron import launch

ITERATIONS = 120

# The demo's model and data, without evaluation, checkpoints and logs.
FLAGS = (
    "--num-layers 6 --hidden-size 192 --ffn-hidden-size 512 --num-attention-heads 6 "
    "--group-query-attention --num-query-groups 2 --seq-length 128 --max-position-embeddings 128 "
    "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--data-path runs/demo/data/stdlib --data-cache-path runs/demo/data/cache --split 98,2,0 "
    "--tokenizer-type NullTokenizer --vocab-size 257 --tensor-model-parallel-size 2 "
    "--micro-batch-size 8 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    f"--weight-decay 0.1 --train-iters {ITERATIONS} --log-interval 1000 --eval-iters 0 "
    "--eval-interval 1000 --llr-active-iters 1"
).split()


def main() -> None:
    """Train, toggling the layer groups, and print the ratios."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    sys.argv[1:] = launch.prepare_device(FLAGS)
    import megatron.training.training as training_module
    from megatron.training import print_rank_0

    from megatron_llr.megatron import job

    training = training_module
    inner_step: Any = None
    spent: dict[tuple[str, bool], list[float]] = {}
    train_step, count = training.train_step, 0

    def timed_train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count, inner_step
        optimizer = args[3]
        groups = optimizer.llr.layer_groups._inner
        multipliers = [dict(inner.multipliers) for inner in groups]
        extended = count % 2 == 0
        for inner in groups:
            inner.multipliers = inner.multipliers if extended else {}
        if inner_step is None:
            inner_step = optimizer.step

            def timed_inner() -> Any:
                begun = time.perf_counter()
                result = inner_step()
                spent.setdefault(("optimizer step", count % 2 == 0), []).append(
                    time.perf_counter() - begun
                )
                return result

            optimizer.step = timed_inner
        begun = time.perf_counter()
        result = train_step(*args, **kwargs)
        spent.setdefault(("iteration", extended), []).append(time.perf_counter() - begun)
        for inner, kept in zip(groups, multipliers, strict=True):
            inner.multipliers = kept
        count += 1
        return result

    training.train_step = timed_train_step
    job.pretrain()
    by_name: dict[str, dict[bool, float]] = {}
    for name in ("iteration", "optimizer step"):
        medians = {on: statistics.median(spent[name, on][5:]) for on in (True, False)}
        by_name[name] = medians
        print_rank_0(
            f"{name}: {1000 * medians[True]:.2f} ms with, {1000 * medians[False]:.2f} ms without, "
            f"ratio {medians[True] / medians[False]:.4f}"
        )
    added = by_name["optimizer step"][True] - by_name["optimizer step"][False]
    print_rank_0(f"added to an iteration: {100 * added / by_name['iteration'][False]:.2f} %")
    job.shut_down()


if __name__ == "__main__":
    main()
