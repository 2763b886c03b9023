#!/usr/bin/env bash
# Trains the tiny Countdown model on this machine. Arguments go to collab_jax.train and win over the ones here, e.g.
#   launch/quickstart.sh --workdir runs/second --config.seed=1
# Relative paths are meant from the root of the repository.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare
say "training configs/countdown_tiny_ours.py"
exec .venv/bin/python -m collab_jax.train --config configs/countdown_tiny_ours.py --workdir runs/quickstart "$@"
