#!/usr/bin/env bash
# The 130M model of arXiv 2605.22297: 5,200 steps, 2.7B tokens. Not run yet.
# Usage: DATA=/data/fineweb_text_document TOKENIZER=/data/tokenizer examples/llama_130m.sh [flags]
# Flags given here come last and override. --help lists the environment variables.
set -euo pipefail
export NAME=llama_130m LAYERS=12 HIDDEN=768 FFN=2048 HEADS=12
export STEPS=5200 LR=1e-3 MIN_LR=1e-4 MICRO_BATCH=32
exec bash "$(dirname "${BASH_SOURCE[0]}")/common/llama.sh" "$@"
