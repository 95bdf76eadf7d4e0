#!/usr/bin/env bash
# The 3B model of arXiv 2605.22297: 60,000 steps, 31B tokens. Not run to the end.
# Steps and learning rate are read off the paper's figures. Uses FP8 by default; FP8=0 trains in bf16.
# Usage: DATA=/data/fineweb_text_document TOKENIZER=/data/tokenizer examples/llama_3b.sh [flags]
# Flags given here come last and override. --help lists the environment variables.
set -euo pipefail
export NAME=llama_3b LAYERS=32 HIDDEN=2560 FFN=6848 HEADS=32
export STEPS=60000 LR=3e-4 MIN_LR=3e-5 MICRO_BATCH=4
export FP8=${FP8:-1}
exec bash "$(dirname "${BASH_SOURCE[0]}")/common/llama.sh" "$@"
