#!/usr/bin/env bash
# Serves the embedded model and a simulated cloud at http://127.0.0.1:8000, where a browser finds the playground. Arguments go
# to collab_jax.serve and win over the ones here, e.g.
#   launch/serve.sh --model runs/countdown-hf --config configs/countdown_tiny_ours.py --port 8080
# Relative paths are meant from the root of the repository. COLLAB_OPERATOR_KEY is the key to the budget; where it is not set,
# one is made; empty: nobody has it.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare serve
if [ -z "${COLLAB_OPERATOR_KEY+set}" ]; then
  COLLAB_OPERATOR_KEY="$(.venv/bin/python -c 'import secrets; print(secrets.token_urlsafe(9))')"
  export COLLAB_OPERATOR_KEY
  say "the operator's key, to set the budget: $COLLAB_OPERATOR_KEY"
fi
say "serving; stop it with Ctrl-C"
exec .venv/bin/python -m collab_jax.serve --workdir runs/serve "$@"
