#!/bin/sh
# make-venv.sh DIR: a virtual environment with pip in DIR, from $PYTHON or else the first Python >= 3.11 that can make
# one. A sound environment that is there already is kept.
set -eu
venv=$1

suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if suitable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

if [ -n "${PYTHON:-}" ]; then
    if ! suitable "$PYTHON"; then
        echo "PYTHON=$PYTHON is not a Python 3.11 or newer with the modules venv and ensurepip." >&2
        exit 1
    fi
    candidates=$PYTHON
else
    candidates="python3 python3.11 python3.12 python3.13 python3.14"
fi

for python in $candidates; do
    if suitable "$python"; then
        echo "making $venv with $("$python" --version) ($(command -v "$python"))"
        # --clear: whatever half-made environment is there is in the way.
        "$python" -m venv --clear "$venv" && exit 0
    fi
done

echo "Found no Python 3.11 or newer that can make a virtual environment." >&2
echo "Install one (on Debian and Ubuntu: apt-get install python3-venv), or name it: make PYTHON=/path/to/python" >&2
exit 1
