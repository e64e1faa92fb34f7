# Sourced by the other scripts, in the checkout: `set_up EXTRA` makes sure that .venv holds the
# project with that extra of setup.py ('plots' or 'dev'), and that `python` runs it.
# PYTHON=/path/to/python3.12 chooses the Python for a new .venv; to change it later, remove .venv
# first.

fail() { echo "$*" >&2; exit 1; }

# Python 3.10-3.13, as setup.py says, and able to make environments with pip in them. Running it is
# the only sure test: a pyenv shim is found on the PATH and fails, and Debian's python3 comes
# without ensurepip.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
        2>/dev/null
}

find_python() {
    local python
    if [ -n "${PYTHON:-}" ]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON does not run Python 3.10, 3.11, 3.12 or 3.13" \
                                 "with its venv module."
        echo "$PYTHON"
        return
    fi
    for python in python3.13 python3.12 python3.11 python3.10 python3 python; do
        usable "$python" && echo "$python" && return
    done
    fail 'No Python 3.10, 3.11, 3.12 or 3.13 with its venv module was found; install one' \
         '(Debian, Ubuntu: apt install python3 python3-venv), or name one:' \
         'PYTHON=/path/to/python3.12 bash scripts/run.sh'
}

# What an installation depends on; it is written down only after pip has succeeded, so an
# interrupted one is done again.
fingerprint() { echo "$PWD"; cksum < setup.py; }

install() {
    local extra=$1 stamp=.venv/installed-$1 python
    [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && usable .venv/bin/python && return
    if ! usable .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        echo "Creating .venv with $("$python" --version)" >&2
        "$python" -m venv --clear .venv ||
            fail "The environment $PWD/.venv could not be created; see the lines above."
    fi
    echo "Installing TensorFlow and the other packages of setup.py[$extra] into .venv" \
         "(once; takes a few minutes)" >&2
    .venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".[$extra]" ||
        fail "The packages could not be installed into $PWD/.venv; see pip's lines above, then" \
             "run this again (if that does not help, after removing .venv)."
    fingerprint > "$stamp.$$" && mv "$stamp.$$" "$stamp"
    echo "Installed. To type python and pip commands in it: . .venv/bin/activate" >&2
}

set_up() {
    # One set-up at a time: a second caller waits, then finds the work done. Only where flock exists
    # (Linux), and only until the end of the set-up, so that two runs may train at once.
    exec 9<setup.py
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        echo 'Waiting for another set-up of .venv to finish' >&2
        flock 9 || true
    fi
    unset PYTHONHOME PYTHONPATH  # they would put another Python's packages before those of .venv
    install "$1"
    exec 9<&-
    PATH=$PWD/.venv/bin:$PATH
    # Memory in pages of 2 MB, where Linux has them for those who ask: a step takes 2 to 5 % less.
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}
