#!/usr/bin/env bash
# Download what `make gpu` needs on a machine with Python 3.12, PyTorch and no network.
# Usage: tools/gpu_wheels.sh [--list | --check] [--te] [FOLDER]   (default: wheels)
#
# Run it where there is a network. It downloads megatron-core and what it imports: 18 MB, numpy 15 of them. What is
# already on the GPU machine stays.
# --te     adds Transformer Engine (tools/te_wheels.txt): FP8 cases and its FusedAdam. Its torch library exists as source
#          only and fits one PyTorch version: it is built here against TORCH (2.11.0), half an hour on two cores.
# --list   prints the packages, downloads nothing.
# --check  checks that FOLDER is complete, downloads nothing. A download ends with the same check.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/common/usage.sh
show_usage tools/gpu_wheels.sh -- "$@"

TORCH=${TORCH:-2.11.0}
PYTHON=${PYTHON:-$(if [[ -x .venv/bin/python ]]; then echo .venv/bin/python; else echo python3; fi)}
# Pinned in requirements.txt, so that the figures are of the versions that are tested.
NEEDS=(megatron-core psutil packaging numpy setuptools)

with_te=false action=download folder=wheels
for argument in "$@"; do
    case $argument in
        --te) with_te=true ;;
        --list) action=list ;;
        --check) action=check ;;
        -*)
            echo "gpu_wheels.sh: got $argument; allowed: --list, --check, --te, FOLDER" >&2
            exit 2
            ;;
        *) folder=$argument ;;
    esac
done

wanted=()
for name in "${NEEDS[@]}"; do
    wanted+=("$(grep -E "^$name==" requirements.txt)")
done
built=()
if $with_te; then
    mapfile -t engine < <(grep -E '^[^#]' tools/te_wheels.txt)
    wanted+=("${engine[@]}")
    built=("${engine[0]/transformer_engine==/transformer_engine_torch==}")
fi
if [[ $action == list ]]; then
    printf '%s\n' "${wanted[@]}"
    ! $with_te || printf '%s (built against torch %s)\n' "${built[0]}" "$TORCH"
    exit 0
fi

if [[ $action == download ]]; then
    mkdir -p "$folder"
    pip=("$PYTHON" -m pip --quiet --disable-pip-version-check)
    target=(--only-binary=:all: --python-version 3.12 --implementation cp --dest "$folder")
    # pip matches a platform exactly, where an installer takes all that are older.
    for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do
        target+=(--platform "manylinux_${glibc}_x86_64")
    done
    target+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64)
    "${pip[@]}" download --no-deps "${target[@]}" "${wanted[@]}"
    if $with_te && ! compgen -G "$folder/transformer_engine_torch-*.whl" >/dev/null; then
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
            "${own[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$build" "${built[0]}"
        mv "$build"/transformer_engine_torch-*.whl "$folder/"
    fi
fi
"$PYTHON" tools/check_wheels.py "$folder" "${wanted[@]}" "${built[@]}"
du -sh "$folder"
