#!/usr/bin/env bash
# Train a small LLaMA-style model with layerwise learning rates on the sources of Python's standard
# library: tensor parallelism over two ranks, on CPU. Writes everything to runs/demo.
# Usage: examples/demo.sh [flags]      (`make demo` builds .venv first)
# Environment variables:
#   RUN      folder that is replaced   (runs/demo)
#   ITERS    updates                   (150)
#   PYTHON   interpreter               (.venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/common/usage.sh
show_usage examples/demo.sh -- "$@"

PYTHON=${PYTHON:-.venv/bin/python}
RUN=${RUN:-runs/demo}
ITERS=${ITERS:-150}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

rm -rf "$RUN"
mkdir -p "$RUN"
"$PYTHON" -W ignore tools/make_demo_data.py "$RUN/data/stdlib"

MODEL_ARGS=(
    --num-layers 6
    --hidden-size 192
    --ffn-hidden-size 512
    --num-attention-heads 6
    --group-query-attention
    --num-query-groups 2
    --seq-length 128
    --max-position-embeddings 128
    --swiglu
    --normalization RMSNorm
    --position-embedding-type rope
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
DATA_ARGS=(
    --data-path "$RUN/data/stdlib"
    --data-cache-path "$RUN/data/cache"
    --split "98,2,0"
    --tokenizer-type NullTokenizer
    --vocab-size 257
)
TRAINING_ARGS=(
    --tensor-model-parallel-size 2
    --micro-batch-size 8
    --global-batch-size 8
    --train-iters "$ITERS"
    --lr 1e-3
    --min-lr 1e-4
    --lr-warmup-iters 15
    --lr-decay-style cosine
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed 1234
)
LOGGING_ARGS=(
    --log-interval 5
    --eval-interval 75
    --eval-iters 8
    --save "$RUN/checkpoint"
    --save-interval 75
    --ckpt-format torch_dist
    --tensorboard-dir "$RUN/tensorboard"
)
LLR_ARGS=(
    --llr-device cpu
    --llr-interval 20
    --llr-ramp-iters 10
    --llr-active-fraction 0.6
    --llr-log-dir "$RUN"
    --llr-log-relative-update
    --llr-fixed-validation
)

COMMAND=(
    "$PYTHON" -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d
    --rdzv-endpoint localhost:0 pretrain_gpt_llr.py
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LOGGING_ARGS[@]}"
    "${LLR_ARGS[@]}" "$@"
)
show_command "${COMMAND[@]}"
# The full log goes to a file, a selection of its lines to the terminal.
"${COMMAND[@]}" 2>&1 | tee "$RUN/log.txt" |
    grep --line-buffered -E '\[llr\]|iteration +[0-9]+/| validation loss|Error|successfully saved' |
    sed -uE 's/^ *\[[^]]*\] //; s/ \| (consumed|elapsed|global|loss scale|grad|number|params)[^|]*//g; s/ \|[^|]*in billions[^|]*//'
"$PYTHON" tools/report_run.py "$RUN"
