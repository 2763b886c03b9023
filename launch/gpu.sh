#!/usr/bin/env bash
# From a config to an exported, calibrated model on a machine with NVIDIA GPUs; stages.sh says how. E.g.
#   launch/gpu.sh configs/math_qwen2p5_1p5b.py runs/math_qwen --config.task.data_dir=data
# Relative paths are meant from the root of the repository.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
. launch/stages.sh

prepare gpu
stages gpu "$@"
