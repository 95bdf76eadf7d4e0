#!/usr/bin/env bash
# Build .venv-gpu on a GPU machine from a folder of wheels, without a network: the machine's own Python
# packages, PyTorch among them, plus what they lack.
# Usage: tools/bootstrap_gpu.sh [FOLDER]   (default: wheels, from tools/gpu_wheels.sh)
# GPU_PYTHON: a Python 3.12 that has PyTorch; python3 without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-wheels}
python=${GPU_PYTHON:-python3}
"$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 12))' || {
    echo "megatron_llr: got $("$python" --version); allowed: Python 3.12 or newer; set GPU_PYTHON" >&2
    exit 1
}
"$python" -c 'import torch' || {
    echo "megatron_llr: $python has no PyTorch; set GPU_PYTHON to one that has 2.11 or newer" >&2
    exit 1
}
compgen -G "$folder/megatron_core-*.whl" >/dev/null || {
    echo "megatron_llr: no megatron-core wheel in $folder; run tools/gpu_wheels.sh $folder" \
        "where there is a network, and bring the folder" >&2
    exit 1
}

rm -rf .venv-gpu
"$python" -m venv --without-pip .venv-gpu
own=$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# $python may itself be a virtual environment, whose packages --system-site-packages would not show.
"$python" -c 'import sys
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' >"$own/base.pth"
# What the machine has stays: another numpy could break what was built for its own.
mapfile -t missing < <(.venv-gpu/bin/python - "$folder" <<'END'
import pathlib, re, sys
from importlib import metadata

plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
there = {plain(found.metadata["Name"] or "") for found in metadata.distributions()}
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    name = plain(wheel.name.split("-")[0])
    if name not in there or name == "megatron-core":
        print(wheel)
END
)
"$python" -m pip --python .venv-gpu/bin/python --quiet --disable-pip-version-check install \
    --no-index --no-deps "${missing[@]}"
.venv-gpu/bin/python -c 'import torch, numpy, psutil, packaging, megatron.core
print(f"torch {torch.__version__}, GPU: {torch.cuda.is_available()}")'
