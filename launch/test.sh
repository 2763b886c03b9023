#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest, e.g. launch/test.sh tests/test_gapg.py -x
# --fast as the first argument leaves out the slow ones. Two processes share the work, file by file.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "not slow" "$@"
fi

prepare test
say "running the tests"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
