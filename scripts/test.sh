#!/usr/bin/env bash
# Runs linter and tests in their own environment, which it makes at the first call; arguments go to
# pytest:
#   bash scripts/test.sh                     all but the slow tests
#   bash scripts/test.sh --slow -k sinusoid  the slow ones too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/environment.sh
set_up dev
ruff check .
ruff format --check .
# Two at a time; each process begins with one half, so that what a file shares is mostly made once.
exec python -m pytest --numprocesses=2 --dist=worksteal "$@"
