#!/usr/bin/env bash
# Environment variables:
#   DATA        absolute path prefix of the .bin/.idx pair   (required)
#   TOKENIZER   folder or name of a Hugging Face tokenizer   (required; the paper's: T5's)
#   RUN         folder of checkpoint and logs                (runs/<name>)
#   GPUS        processes per node                           (8)
#   NNODES, HEAD_NODE  number of nodes, address of the first  (from SLURM, or one node)
#   PORT        of the first node, with several nodes        (29500)
#   FP8=1       FP8 matrix products (Hopper or newer); rounds --ffn-hidden-size up to a multiple of 16
#   PYTHON      interpreter of the environment               (python3)
#
# examples/llama_*.sh set the size and call this file. On several nodes, start it once per node with srun
# (examples/llama_*.sbatch) or by hand. Where Transformer Engine or apex is absent, flags that turn off the
# fusions that need them are added, and said.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/common/usage.sh
show_usage "examples/$NAME.sh" examples/common/llama.sh -- "$@"

DATA=${DATA:?must be the path prefix of the .bin/.idx pair, see --help}
TOKENIZER=${TOKENIZER:?must be a folder or the name of a Hugging Face tokenizer, see --help}
RUN=${RUN:-runs/$NAME}
PYTHON=${PYTHON:-python3}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
NNODES=${NNODES:-${SLURM_NNODES:-1}}
if [[ -z ${HEAD_NODE:-} && -n ${SLURM_JOB_NODELIST:-} ]]; then
    HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
# One node needs no fixed port: with 0 the launcher chooses one.
ENDPOINT=localhost:0
if ((NNODES > 1)); then
    ENDPOINT=${HEAD_NODE:?address of the first node}:${PORT:-29500}
fi

export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL_ARGS=(
    --num-layers "$LAYERS"
    --hidden-size "$HIDDEN"
    --ffn-hidden-size "$FFN"
    --num-attention-heads "$HEADS"
    --seq-length 1024
    --max-position-embeddings 1024
    --swiglu
    --normalization RMSNorm
    --position-embedding-type rope
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
# Batches of 512 x 1024 tokens, AdamW with decay 0.1, warmup over a tenth, cosine to a tenth.
TRAINING_ARGS=(
    --bf16
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size 512
    --train-iters "$STEPS"
    --lr "$LR"
    --min-lr "$MIN_LR"
    --lr-warmup-iters "$((STEPS / 10))"
    --lr-decay-style cosine
    --weight-decay 0.1
    --clip-grad 1.0
    --seed 6198
)
ROUND=()
if [[ ${FP8:-0} == 1 ]]; then
    TRAINING_ARGS+=(--fp8-format hybrid --fp8-recipe tensorwise)
    ROUND=(--round-ffn)
fi
DATA_ARGS=(
    --data-path "$DATA"
    --split "999,1,0"
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
)
LOGGING_ARGS=(
    --log-interval 10
    --eval-interval 400
    --eval-iters 16
    --save "$RUN/checkpoint"
    --load "$RUN/checkpoint"
    --save-interval 1000
    --ckpt-format torch_dist
    --tensorboard-dir "$RUN/tensorboard"
)
LLR_ARGS=(
    --llr-interval 100
    --llr-ramp-iters 50
    --llr-active-fraction 0.2
    --llr-log-dir "$RUN"
)

FLAGS=(
    "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "${LLR_ARGS[@]}" "$@"
)
# Flags for absent packages, and a width for FP8 products.
ADDED=$("$PYTHON" -m megatron_llr.megatron.launcher_flags "${ROUND[@]}" -- "${FLAGS[@]}")
ADDED_ARGS=()
[[ -z $ADDED ]] || mapfile -t ADDED_ARGS <<<"$ADDED"
COMMAND=(
    "$PYTHON" -m torch.distributed.run
    --nnodes "$NNODES" --nproc-per-node "$GPUS" --rdzv-backend c10d
    --rdzv-id "${SLURM_JOB_ID:-0}" --rdzv-endpoint "$ENDPOINT"
    pretrain_gpt_llr.py "${FLAGS[@]}" "${ADDED_ARGS[@]}"
)
show_command "${COMMAND[@]}"
exec "${COMMAND[@]}"
