#!/usr/bin/env bash
# Make the virtual environment DIR and install longstride into it, editable, with pinned versions.
# usage: scripts/install.sh DIR [EXTRA]      EXTRA: dev (what lint and tests need)
# PYTHON picks the interpreter. On a machine without an NVIDIA driver torch is installed without CUDA, from TORCH_INDEX_URL if
# that is set (a package index that holds CPU builds), else from where pip looks anyway; if there is none, the normal build.
set -euo pipefail

venv=$1
extra=${2:-}

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}; on Debian or Ubuntu: apt-get install python3 python3-venv"
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; on Debian or Ubuntu: apt-get install python3-venv"
    "$python" -m venv --clear "$venv"
}

has_nvidia_driver() { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null 2>&1; }

install_torch() {
    local pinned
    pinned=$(sed -n 's/^torch==//p' constraints/torch.txt)
    "$venv/bin/python" -c "from importlib.metadata import version; exit(version('torch').split('+')[0] != '$pinned')" 2>/dev/null && return
    if has_nvidia_driver; then
        "${pip[@]}" -c constraints/torch.txt torch
    elif [ -n "${TORCH_INDEX_URL:-}" ]; then
        "${pip[@]}" --index-url "$TORCH_INDEX_URL" -c constraints/torch-cpu.txt torch
    elif ! "${pip[@]}" -c constraints/torch-cpu.txt torch 2>/dev/null; then
        if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
            echo 'note: pip finds no CPU-only torch here, so the CUDA build is installed (3 GB, works without a GPU).' \
                'A smaller one: set TORCH_INDEX_URL to the CPU package index that pytorch.org names, then make install again.'
        fi
        "${pip[@]}" -c constraints/torch.txt torch
    fi
}

"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || make_venv
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
install_torch
log=$venv/install.log
if ! "${pip[@]}" -c constraints/torch.txt -c constraints/packages.txt -e ".${extra:+[$extra]}" 2>"$log"; then
    cat "$log" >&2
    if grep -qE "(gcc|cc|g\+\+|c\+\+|clang)'? (failed|not found)|No such file or directory: '(gcc|cc|g\+\+)'|compiler" "$log"; then
        fail 'a package had to be compiled and there is no C compiler; on Debian or Ubuntu: apt-get install build-essential python3-dev'
    fi
    fail "installing failed (above); the environment is $venv"
fi
