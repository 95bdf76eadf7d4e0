#!/usr/bin/env bash
# The 350M model of arXiv 2605.22297: 13,600 steps, 7.1B tokens. Not run to the end.
# Usage: DATA=/data/fineweb_text_document TOKENIZER=/data/tokenizer examples/llama_350m.sh [flags]
# Flags given here come last and override. --help lists the environment variables.
set -euo pipefail
export NAME=llama_350m LAYERS=24 HIDDEN=1024 FFN=2736 HEADS=16
export STEPS=13600 LR=1e-3 MIN_LR=1e-4 MICRO_BATCH=16
exec bash "$(dirname "${BASH_SOURCE[0]}")/common/llama.sh" "$@"
