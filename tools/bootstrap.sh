#!/usr/bin/env bash
# Build .venv in the repository with a Python that megatron-core supports (3.12 or newer).
# Usage: tools/bootstrap.sh   (does nothing where .venv already holds the pinned packages)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

starts() {
    # A pyenv shim can exist for a version that is not selected: only starting it tells.
    "$1" -c 'import sys, venv; raise SystemExit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1
}

candidates() {
    printf '%s\n' python3.12 python3.13 python3 python
    local versions=${PYENV_ROOT:-$HOME/.pyenv}/versions
    printf '%s\n' "$versions"/3.12*/bin/python "$versions"/3.13*/bin/python
    if command -v uv >/dev/null 2>&1; then
        local version
        for version in 3.12 3.13; do
            uv python find --no-project "$version" 2>/dev/null || true
        done
    fi
}

find_python() {
    local candidate
    while IFS= read -r candidate; do
        if command -v "$candidate" >/dev/null 2>&1 && starts "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done < <(candidates)
    echo "megatron_llr: no Python 3.12 or 3.13 found: got $(python3 --version 2>&1 || echo none);" \
        "install one (apt install python3.12 python3.12-venv, pyenv install 3.12, or" \
        "uv python install 3.12) and run this again" >&2
    exit 1
}

stamp=.venv/.installed
wanted=$(cat requirements.txt pyproject.toml | cksum)
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi
python=$(find_python)
echo "building .venv with $("$python" --version) ($python)"
[[ -x .venv/bin/python ]] || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --editable .
printf '%s\n' "$wanted" >"$stamp"
