# Sourced by the scripts beside it. Goes to the root of the repository and offers
#   say TEXT         one line of progress
#   prepare [EXTRA]  makes, repairs or reuses .venv, with this project and its EXTRA of pyproject.toml installed
#   try_bubblewrap   installs bubblewrap where it can
# PYTHON chooses the interpreter; another version than that of .venv makes .venv anew.

# A relative PYTHON is meant from where the user stands.
case "${PYTHON:-}" in
  /*) ;;
  */*) PYTHON="$PWD/$PYTHON" ;;
esac

# CDPATH could send a relative cd elsewhere. -P: the stamp holds the path, and a link must not change it.
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# With .venv activated, its own python would come first on PATH, and it cannot make itself anew.
PATH="${PATH//"$PWD/.venv/bin:"/}"

log="$PWD/.venv/collab_jax.log"
# Exists from the creation of .venv to the end of its first install: where it is found, that run was killed half-way.
unfinished=.venv/collab_jax.unfinished

say() { printf 'collab_jax: %s\n' "$*"; }
fail() {
  printf 'collab_jax: %s\n' "$*" >&2
  exit 1
}

# Sets `python`. Each candidate is run: a name on PATH may be a shim with nothing behind it.
find_python() {
  local candidate no_venv=""
  local candidates=(python3.13 python3.12 python3.11 python3 python)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then continue; fi
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      python="$candidate"
      return
    fi
    no_venv="${no_venv:-$candidate}"
  done
  if [ -n "$no_venv" ]; then
    fail "$no_venv has no venv module: install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON to another Python >= 3.11"
  elif [ -n "${PYTHON:-}" ]; then
    fail "PYTHON=$PYTHON is not a working Python >= 3.11: set PYTHON to one, or unset it"
  fi
  fail "no working Python >= 3.11 on PATH: install one, or set PYTHON to it"
}

minor_version() { "$1" -c 'import sys; assert sys.version_info >= (3, 11); print(sys.version_info[:2])' 2>/dev/null; }

right_python() {
  local have want
  have="$(minor_version .venv/bin/python)" || return 1
  want="$(minor_version "${PYTHON:-.venv/bin/python}")" || return 1
  [ "$have" = "$want" ]
}

# A .venv that somebody else made may lack pip; it is completed, not thrown away.
has_pip() { .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null 2>&1; }

# What an install depends on, as a hash. The path is part of it, since an editable install points at it: a copied tree
# must not run the original's code.
fingerprint() {
  .venv/bin/python -c '
import hashlib, os, sys
parts = [open("pyproject.toml", "rb").read(), sys.argv[1].encode(), sys.version.encode(), os.fsencode(os.getcwd())]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())' "$1" 2>/dev/null
}

stamp() { printf '.venv/collab_jax.installed%s' "${1:+-$1}"; }

is_installed() { [ -s "$(stamp "$1")" ] && [ "$(cat "$(stamp "$1")")" = "$(fingerprint "$1")" ]; }

# Code that a model wrote is judged in bubblewrap's sandbox, without which the tests of that are skipped. Only a try:
# quick, and never a failure.
try_bubblewrap() {
  if command -v bwrap >/dev/null || ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then return 0; fi
  say "installing bubblewrap, for the tests of the sandbox"
  export DEBIAN_FRONTEND=noninteractive
  if ! timeout 60 apt-get install -y --no-install-recommends bubblewrap >/dev/null 2>&1; then
    timeout 60 apt-get update >/dev/null 2>&1 || true
    timeout 60 apt-get install -y --no-install-recommends bubblewrap >/dev/null 2>&1 ||
      say "bubblewrap cannot be installed here: the tests of the sandbox are skipped"
  fi
}

prepare() {
  local extra="${1:-}" covered python
  if right_python && is_installed "$extra"; then
    say "reusing .venv"
    return
  fi

  if [ -e "$unfinished" ] || ! right_python || ! has_pip; then
    find_python
    say "creating .venv with $python"
    rm -rf .venv
    mkdir .venv
    : >"$unfinished"
    "$python" -m venv .venv >"$log" 2>&1 || fail "$python could not create .venv: its output is in $log"
  fi

  say "installing packages into .venv (once, a few minutes)"
  rm -f .venv/collab_jax.installed*
  .venv/bin/python -m pip install --no-input --disable-pip-version-check -e ".${extra:+[$extra]}" >"$log" 2>&1 ||
    fail "pip failed; most often no package index is reachable: check network, proxy and PIP_INDEX_URL, then run this again (pip's output: $log)"
  # An install with an extra covers the one without.
  for covered in "" "$extra"; do fingerprint "$covered" >"$(stamp "$covered")"; done
  rm -f "$unfinished"
}
