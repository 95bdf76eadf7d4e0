#!/usr/bin/env bash
# Download what `make gpu` needs on a machine with Python 3.12, PyTorch and no network.
# Usage: tools/gpu_wheels.sh [--list] [--te] [FOLDER]   (default: wheels; run it where there is a network)
#
# megatron-core and what it imports: 18 MB, numpy 15 of them. What is already on that machine stays.
# --te adds Transformer Engine: FP8 cases and its FusedAdam.
# Its torch library exists as source only and fits one PyTorch version: it is built here against
# TORCH (2.11.0), about 15 minutes on two cores. --te has not been run yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=${TORCH:-2.11.0}
PYTHON=${PYTHON:-$(if [[ -x .venv/bin/python ]]; then echo .venv/bin/python; else echo python3; fi)}
TE=2.20.2
# Pinned in requirements.txt, so that the figures are of the versions that are tested.
NEEDS=(megatron-core psutil packaging numpy setuptools)
# What transformer_engine.pytorch imports.
TE_NEEDS=(einops onnx onnxscript pydantic nvdlfw-inspect nvidia-cudnn-frontend)

with_te=false list=false folder=wheels
for argument in "$@"; do
    case $argument in
        --te) with_te=true ;;
        --list) list=true ;;
        -*)
            echo "gpu_wheels.sh: got $argument; allowed: --list, --te, FOLDER" >&2
            exit 2
            ;;
        *) folder=$argument ;;
    esac
done

wanted=()
for name in "${NEEDS[@]}"; do
    wanted+=("$(grep -E "^$name==" requirements.txt)")
done
if $list; then
    printf '%s\n' "${wanted[@]}"
    if $with_te; then
        printf '%s\n' "transformer_engine==$TE" "transformer_engine_cu13==$TE" \
            "transformer_engine_torch==$TE (built against torch $TORCH)" "${TE_NEEDS[@]}"
    fi
    exit 0
fi

mkdir -p "$folder"
pip=("$PYTHON" -m pip --quiet --disable-pip-version-check)
target=(--only-binary=:all: --python-version 3.12 --implementation cp --dest "$folder")
# pip matches a platform exactly, where an installer takes all that are older.
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do
    target+=(--platform "manylinux_${glibc}_x86_64")
done
target+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64)
"${pip[@]}" download --no-deps "${target[@]}" "${wanted[@]}"

if $with_te; then
    # With what these need in turn, but for PyTorch, which is there.
    "${pip[@]}" download "${target[@]}" "${TE_NEEDS[@]}"
    "${pip[@]}" download --no-deps "${target[@]}" "transformer_engine==$TE" \
        "transformer_engine_cu13==$TE"
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    "$PYTHON" -m venv "$build/venv"
    own=("$build/venv/bin/python" -m pip --quiet --disable-pip-version-check)
    "${own[@]}" install "torch==$TORCH" "setuptools>=77" wheel numpy einops \
        "nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*"
    site=$("$build/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    headers=$(printf '%s:' "$site"/nvidia/*/include)
    CPATH="$headers${CPATH:-}" CUDA_HOME="$site/nvidia/cu13" NVTE_FRAMEWORK=pytorch \
        NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-2}" \
        "${own[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$folder" \
        "transformer_engine_torch==$TE"
fi
du -sh "$folder"
