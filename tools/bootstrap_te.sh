#!/usr/bin/env bash
# Build .venv-te: .venv's packages plus Transformer Engine, for tests that need its real classes.
# Usage: tools/bootstrap_te.sh [--if-cached]
#
# Its torch library exists as source only: about 15 minutes on two cores, once. The built wheel (1 MB) is
# kept in ${XDG_CACHE_HOME:-~/.cache}/megatron_llr. With --if-cached nothing is built: exit code 3 where
# no wheel is there. Needs g++; the CUDA headers come with PyTorch's own packages. A GPU is not needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERSION=2.20.2
# What transformer_engine.pytorch imports; the rest of its requirements is in .venv.
NEEDS=(einops onnx onnxscript pydantic nvdlfw-inspect nvidia-cudnn-frontend)
# CUDA headers that PyTorch's packages do not bring, of the version that it was built with.
HEADERS=("nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*")

[[ -x .venv/bin/python ]] || tools/bootstrap.sh
tag=$(.venv/bin/python -c 'import sys, torch
print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}")')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_llr/transformer_engine-$VERSION-$tag
stamp=.venv-te/.installed
wanted="$VERSION $tag $(cksum <requirements.txt)"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi
built() { compgen -G "$cache/transformer_engine_torch-*.whl" >/dev/null; }
if [[ ${1:-} == --if-cached ]] && ! built; then
    exit 3
fi

rm -rf .venv-te
.venv/bin/python -m venv .venv-te
# .venv's packages come after its own, so that nothing of 5 GB is installed twice.
where='import sysconfig; print(sysconfig.get_path("purelib"))'
site=$(.venv/bin/python -c "$where")
own=$(.venv-te/bin/python -c "$where")
echo "$site" >"$own/base.pth"
pip=(.venv-te/bin/python -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "${NEEDS[@]}"

if ! built; then
    echo "building transformer_engine_torch $VERSION ($tag), once: about 15 minutes on two cores"
    mkdir -p "$cache"
    partial=$(mktemp -d "$cache/.partial-XXXX")
    trap 'rm -rf "$partial"' EXIT
    "${pip[@]}" install --no-deps --target "$partial/headers" "${HEADERS[@]}"
    headers=$(printf '%s:' "$partial"/headers/nvidia/*/include "$site"/nvidia/*/include)
    # CUDA_HOME: the folder that holds PyTorch's own CUDA headers, whatever else is on the machine.
    CPATH="$headers${CPATH:-}" CUDA_HOME="$site/nvidia/cu13" NVTE_FRAMEWORK=pytorch \
        NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-2}" \
        "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$partial" \
        "transformer_engine_torch==$VERSION"
    mv "$partial"/transformer_engine_torch-*.whl "$cache/"
fi
# It looks for CUDA's libraries next to itself.
mkdir -p "$own/nvidia"
for folder in "$site"/nvidia/*/; do
    [[ -e $own/nvidia/$(basename "$folder") ]] || ln -s "$folder" "$own/nvidia/"
done
# Both or neither: half of it makes `import megatron.core` fail.
"${pip[@]}" install --no-deps "transformer_engine==$VERSION" "transformer_engine_cu13==$VERSION" \
    "$cache"/transformer_engine_torch-*.whl
printf '%s\n' "$wanted" >"$stamp"
