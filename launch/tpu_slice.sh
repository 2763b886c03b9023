#!/usr/bin/env bash
# Training on all hosts of a TPU slice, from your own machine, by gcloud:
#   launch/tpu_slice.sh NAME ZONE CONFIG WORKDIR [--config.KEY=VALUE ...]
# copies the last commit to the hosts, installs it there and starts a process on each, which stays when the connection ends and
# starts again where it was asked to stop. WORKDIR lies on a file system that the hosts share (Filestore;
# no bucket: the store of answers is a database, which gcsfuse cannot hold).
# Each host has a collab_jax.log at home; that of host 0 tells how the run stands. To stop it, with its state saved:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="pkill -f collab_jax.train"
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 4 ] || fail "usage: $0 NAME ZONE CONFIG WORKDIR [--config.KEY=VALUE ...]"
command -v gcloud >/dev/null || fail "gcloud is not there: install the Google Cloud CLI, and log in"
name="$1" zone="$2" config="$3" workdir="$4"
shift 4

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
on_all() { tpu ssh "$name" --worker=all --command="$1"; }
hosts="$(tpu describe "$name" --format='value(networkEndpoints[].ipAddress)' | tr ';' '\n' | grep -c .)" ||
  fail "$name has no hosts: is it ready?"

archive="$(mktemp -d)/collab_jax.tar.gz"
git archive --output="$archive" HEAD
tpu scp "$archive" "$name:" --worker=all
rm -r "$(dirname "$archive")"
on_all "mkdir -p collab_jax && tar -xzf collab_jax.tar.gz -C collab_jax && . collab_jax/launch/env.sh && prepare tpu"

say "starting $hosts hosts"
train="$(printf '%q ' .venv/bin/python -m collab_jax.train --config "$config" --workdir "$workdir" --hosts "$hosts" "$@")"
loop="status=75; while [ \$status = 75 ]; do status=0; $train || status=\$?; done"
on_all "cd collab_jax && { setsid nohup bash -c $(printf '%q' "$loop") >../collab_jax.log 2>&1 </dev/null & }"
