#!/usr/bin/env bash
# Serves the embedded model and a simulated cloud at http://127.0.0.1:8000. Arguments go to collab_jax.serve and win over
# the ones here, e.g.
#   launch/serve.sh --model runs/ours-hf --config configs/countdown_tiny_ours.py --port 8080
# Relative paths are meant from the root of the repository.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare serve
say "serving; stop it with Ctrl-C"
exec .venv/bin/python -m collab_jax.serve --workdir runs/serve "$@"
