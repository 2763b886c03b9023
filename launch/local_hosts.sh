#!/usr/bin/env bash
# A job of several hosts on one machine, each a process with CPU devices of its own: what a slice or a cluster does, at hand.
#   launch/local_hosts.sh 2 2 -m collab_jax.train --config configs/countdown_tiny.py --workdir runs/two_hosts
# HOSTS, DEVICES of each, then what python is to run, to which the flags that join the hosts are added. Ends with the first
# status that is neither 0 nor 75, and stops the other hosts then; with 75 (start me again) where a host ends with that.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 3 ] || fail "usage: $0 HOSTS DEVICES ARGUMENT_OF_PYTHON ..."
hosts="$1" devices="$2"
shift 2
python="${PYTHON:-.venv/bin/python}"
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"

# By default XLA makes as many threads as there are cores, which changes the last bits of sums.
export NPROC="$((hosts * devices))"
pids=() asked=""
trap 'kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT # of a job that lost a host; what it saved is complete
trap 'asked=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((host = 0; host < hosts; host++)); do
  "$python" "$@" --hosts="$hosts" --host="$host" --coordinator="127.0.0.1:$port" --config.cpu_devices="$devices" &
  pids+=($!)
done
left="$hosts" saved=0
while [ "$left" -gt 0 ]; do
  status=0
  wait -n || status=$?
  if [ "$status" -gt 128 ] && [ -n "$asked" ]; then # the trap has ended the wait, and no host
    asked=""
    continue
  fi
  case "$status" in
    0) ;;
    75) saved=75 ;;
    *) exit "$status" ;;
  esac
  left=$((left - 1))
done
exit "$saved"
