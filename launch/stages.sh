# Sourced by gpu.sh, tpu_vm.sh and real.sh, after env.sh. Offers
#   stages BACKEND CONFIG WORKDIR [FLAG ...]   from a config to an exported, calibrated model
# WORKDIR gets the folders start (the warm-started model or adapter), run (training and evaluation), model (what is delivered)
# and, under LoRA, adapter (the same for PEFT). A stage whose result exists is not run again, and a warm start or a training
# goes on from its last checkpoint: the same command resumes, whatever stopped it. Flags (--config.KEY=VALUE) go to every
# stage that reads the config; keep them the same.

# Checked before anything is installed; in a sourced file $@ holds the script's arguments.
[ $# -ge 2 ] || fail "usage: $0 CONFIG WORKDIR [--config.KEY=VALUE ...]"

declare -A takes # what to expect of a module's stage, for whoever knows

# stage RESULT MODULE [ARGUMENT ...]
stage() {
  local result="$1"
  shift
  if [ -e "$result" ]; then
    say "$result is there"
    return
  fi
  say "making $result: $1${takes[$1]:+, ${takes[$1]}}"
  local status=0
  .venv/bin/python -m "$@" || status=$?
  [ "$status" = 0 ] || { say "$result was not made: run the same command again to go on" >&2; exit "$status"; }
}

stages() {
  local backend="$1" config="$2" work="$3" found settings note=()
  shift 3
  found="$(.venv/bin/python -c 'import jax; print(jax.default_backend())')"
  [ "$found" = "$backend" ] || fail "jax finds no $backend here, only $found: check the driver, and that no other program holds the device"

  stage "$work/start/sft.json" collab_jax.sft --workdir "$work/start" --config "$config" "$@"
  # Under LoRA the warm start is an adapter, and the model stays what it was.
  local adapter="" from="--config.model.path=$work/start"
  if [ -e "$work/start/adapter_config.json" ]; then adapter=1 from="--config.lora.start=$work/start"; fi
  # After the flags, which may name what the warm start itself began with.
  local rest=(--workdir "$work/run" --config "$config" "$@" "$from")
  stage "$work/run/report.json" collab_jax.train "${rest[@]}"
  stage "$work/run/test.json" collab_jax.evaluate --split test "${rest[@]}"
  stage "$work/model/README.md" collab_jax.export --out "$work/model" "${rest[@]}"
  if [ -n "$adapter" ]; then
    stage "$work/adapter/README.md" collab_jax.export --adapter --out "$work/adapter" "${rest[@]}"
  fi

  settings="$(.venv/bin/python -c '
import json, sys
config = json.load(open(sys.argv[1]))
print(config["budget"], config["text"]["marker"], config["text"]["decision_token"], sep="\n")' "$work/run/config.json")"
  mapfile -t settings <<<"$settings"
  note=(--marker "${settings[1]}")
  if [ -n "${settings[2]}" ]; then note+=(--decision_token "${settings[2]}"); fi
  stage "$work/model/collab_config.json" collab_jax.calibrate --records "$work/run/test.parquet" --out "$work/model" \
    --rate "${settings[0]}" --delta 0.05 --hold_out 0.5 "${note[@]}"
  if [ -n "$adapter" ]; then cp "$work/model/collab_config.json" "$work/adapter/"; fi
  say "$work/model is ready"
}
