#!/usr/bin/env bash
# Runs the tests in their own environment, which it makes at the first call; arguments go to pytest:
#   bash scripts/test.sh                     all but the slow ones
#   bash scripts/test.sh --slow -k sinusoid  the slow ones too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/environment.sh
set_up test
exec python -m pytest "$@"
