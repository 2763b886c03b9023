#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest, e.g. launch/test.sh tests/test_gapg.py -x
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare test
say "running the tests"
exec .venv/bin/python -m pytest "$@"
