#!/usr/bin/env bash
# Zero-shot accuracy of an exported model with EleutherAI's lm-eval, in transformers.
# Usage: examples/zero_shot.sh FOLDER [FLAGS OF LM_EVAL...]
# FOLDER is the output of tools/convert_checkpoint.py, with its tokenizer. Needs the extra `eval`:
# pip install 'megatron-llr[hf,eval]'.
# Environment variables:
#   TASKS    tasks, separated by commas (default: the seven of arXiv 2605.22297, downloaded by lm-eval)
#   TASKS=local  one task that the script makes itself from Python's sources; needs no network
#   OUT      folder of results and data   (FOLDER/zero_shot)
#   DEVICE   cuda, cuda:1, cpu            (cuda if torch sees a GPU)
#   BATCH    sequences at a time          (8)
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}
# shellcheck source=examples/common/usage.sh
source "$HERE/common/usage.sh"
if [[ ${1:-} == -* ]]; then
    show_usage "${BASH_SOURCE[0]}" -- "$1"
fi

FOLDER=${1:?FOLDER: a Hugging Face folder with weights and tokenizer}
shift
TASKS=${TASKS:-openbookqa,winogrande,arc_challenge,arc_easy,hellaswag,social_iqa,piqa}
OUT=${OUT:-$FOLDER/zero_shot}
BATCH=${BATCH:-8}

if [[ ! -f $FOLDER/config.json ]]; then
    echo "zero_shot.sh: there is no config.json in $FOLDER: convert the checkpoint with tools/convert_checkpoint.py" >&2
    exit 1
fi
if ! compgen -G "$FOLDER/tokenizer*" >/dev/null; then
    echo "zero_shot.sh: there is no tokenizer in $FOLDER: convert with --files and the tokenizer's folder" >&2
    exit 1
fi
if ! "$PYTHON" -c "import lm_eval" 2>/dev/null; then
    echo "zero_shot.sh: lm-eval is not installed: pip install 'megatron-llr[hf,eval]'" >&2
    exit 1
fi
DEVICE=${DEVICE:-$("$PYTHON" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")}

TASK_ARGS=(--tasks "$TASKS")
if [[ $TASKS == local ]]; then
    mkdir -p "$OUT"
    "$PYTHON" "$HERE/zero_shot/make_local_task.py" "$OUT/local_task"
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_DATASETS_CACHE="$OUT/local_task/cache"
    TASK_ARGS=(--tasks next_line --include_path "$OUT/local_task")
fi

RUN=(
    "$PYTHON" -m lm_eval run
    --model hf
    --model_args "pretrained=$FOLDER,trust_remote_code=False"
    "${TASK_ARGS[@]}"
    --num_fewshot 0
    --batch_size "$BATCH"
    --device "$DEVICE"
    --output_path "$OUT"
    "$@"
)
printf '%q ' "${RUN[@]}"
echo
exec "${RUN[@]}"
