#!/usr/bin/env bash
# From a config to an exported, calibrated model on a TPU VM of one host (v5e-8 and smaller); stages.sh says how. E.g.
#   launch/tpu_vm.sh configs/math_qwen2p5_1p5b.py runs/math_qwen --config.task.data_dir=data
# Relative paths are meant from the root of the repository. A VM that is taken away (preempted) resumes from its disk.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
. launch/stages.sh

prepare tpu
stages tpu "$@"
