#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest, e.g. launch/test.sh tests/test_gapg.py -x
# --fast as the first argument leaves out the slow ones, --all runs those as well that take minutes each.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "not slow" "$@"
elif [ "${1:-}" = --all ]; then
  shift
  set -- -m "" "$@"
fi

prepare test
try_bubblewrap
say "running the tests"
exec .venv/bin/python -m pytest "$@"
