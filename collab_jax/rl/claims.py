"""A workdir is claimed: config.json says which settings, data and base model its run has.

A later start with others is refused, by the name of what differs.
"""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from collab_jax.models import hf, identity, special_tokens
from collab_jax.runtime import files
from collab_jax.runtime.errors import UserError

# What may differ between two starts of one run: how the cloud is bought from, not what it answers,
# how many of its verdicts an evaluation can do without, and what is kept from it, so that a run can
# be evaluated both ways; and how many devices there are and where parameters lie, which changes the
# last bits of sums alone.
MAY_DIFFER_ON_RESUME = {
    "cloud.mode",
    "cloud.wait",
    "cloud.prefetch",
    "cloud.retries",
    "cloud.max_calls",
    "cloud.max_usd",
    "cloud.when_spent",
    "cloud.base_url",
    "cloud.key_env",
    "cloud.concurrency",
    "cloud.timeouts",
    "cloud.prices",
    "cloud.prices_date",
    "cloud.redact",
    "cloud.redact_names",
    "cpu_devices",
    "eval.max_unknown",
    "train.empty_d1_limit",
    "train.sharded",
}
# Settings of the warm start and its demonstrations, and of a server, which no run reads.
UNREAD = ("sft.", "task.demo_", "serve.")
DATA = "data"  # the entry of config.json, beside the settings, that says what data the run has seen
REWARD = "reward"  # in it, the file of `config.task.reward` or `rubric`; the other names are splits
BASE = "base"  # the entry that says which model the run began with: its `identity.fingerprint`
COMMIT = "commit"  # in it, the commit of a model of the hub


def make_workdir(workdir: pathlib.Path) -> None:
    """Makes the folder if it is absent. Raises UserError where that cannot be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(workdir, error) from None


def check_shared(workdir: pathlib.Path) -> None:
    """Raises UserError where this host does not see what host 0 wrote into `workdir`."""
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} is not what host 0 has there: put --workdir on a file system that all "
            "hosts share"
        )


def claim(config: ConfigDict, workdir: pathlib.Path, unread: tuple[str, ...] = UNREAD) -> None:
    """Writes config.json, or raises UserError where `workdir` holds a run with other settings.

    unread: what the keys begin with that the command does not read.
    """
    file = workdir / "config.json"
    if not file.exists():
        _write_json(file, _as_json(config))
    if differing := differences(file, config, unread=unread):
        raise UserError(
            f"{workdir} holds a run with other settings ({differing}): "
            "use the same settings or another --workdir"
        )


def with_tokens_of(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """Returns a copy of `config` with the special tokens of the run in `workdir`, if there is one.

    They take the place of those that `config` leaves to be found, and of no others.
    """
    config, file = config.copy_and_resolve_references(), workdir / "config.json"
    kept = _read_json(file).get("text", {}) if file.exists() else {}
    for key in kept.keys() & special_tokens.SpecialTokens._fields:
        if special_tokens.is_auto(config.text[key]):
            config.text[key] = type(config.text[key])(kept[key])
    return config


def differences(
    file: pathlib.Path,
    config: ConfigDict,
    all_keys: bool = True,
    unread: tuple[str, ...] = UNREAD,
) -> str:
    """Returns how the settings in `file`, a config.json, differ from `config`: five of them, or "".

    Those of MAY_DIFFER_ON_RESUME and `unread` do not count, nor special tokens that `config` leaves
    to be found, and without `all_keys` only keys that both have.
    Raises UserError where the file cannot be read.
    """
    then, now = _flat(_read_json(file)), _flat(_as_json(config))
    # A run begun before providers had a name bought from its base_url; one before these other keys
    # did what their defaults do.
    if "cloud.base_url" in then:
        then.setdefault("cloud.provider", then["cloud.base_url"])
    then.setdefault("cloud.error_skew", 0.0)
    then.setdefault("task.system", "")
    then.setdefault("lora.start", "")
    then.setdefault("text.decide_after_answer", False)
    then.pop("train.lengths", None)  # a setting that is gone, on which no result depended
    keys = then.keys() | now.keys() if all_keys else then.keys() & now.keys()
    left_to_be_found = {
        f"text.{key}"
        for key in special_tokens.SpecialTokens._fields
        if special_tokens.is_auto(config.text[key])
    }
    differing = [
        f"{key}={then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(keys - MAY_DIFFER_ON_RESUME - left_to_be_found)
        if then.get(key) != now.get(key) and not key.startswith((f"{DATA}.", f"{BASE}.", *unread))
    ]
    return "; ".join(differing[:5])


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings by their keys, those left out that may differ between two starts."""
    flat = _flat(_as_json(config))
    return {key: value for key, value in flat.items() if key not in MAY_DIFFER_ON_RESUME}


def check_unchanged(workdir: pathlib.Path, name: str, contents: dict[str, dict]) -> None:
    """Raises UserError where the data `name` are not those that an earlier start of the run had.

    name: a split, or REWARD. contents: a `fingerprint` by task or file. It is noted in config.json
    where no earlier start has done so.
    """
    file = workdir / "config.json"
    saved = _read_json(file)
    noted = saved.get(DATA, {})
    if name not in noted:
        _write_json(file, saved | {DATA: noted | {name: contents}})
        return
    changed = [
        f"{part}: {_described(noted[name].get(part))} then, {_described(contents.get(part))} now"
        for part in sorted(noted[name].keys() | contents.keys())
        if noted[name].get(part) != contents.get(part)
    ]
    if changed:
        raise UserError(
            f"the data ({name}) have changed since the run in {workdir} began: "
            f"{'; '.join(changed)}: restore them, or use another --workdir"
        )


def check_reward(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises UserError where the file of the reward, or of the rubric, is another than before."""
    if path := config.task.reward.rpartition(":")[0] or config.task.rubric:
        source = pathlib.Path(path).expanduser()
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        check_unchanged(workdir, REWARD, {source.name: files.fingerprint(lines, "lines")})


def check_base(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Raises UserError where the model in `folder` is not the one that the run began with.

    What is compared is its `identity.fingerprint`, noted in config.json where no earlier start has
    done so, with the commit of a model of the hub.
    """
    file = workdir / "config.json"
    saved, now = _read_json(file), identity.fingerprint(folder)
    if BASE not in saved:
        commit = hf.commit(folder)
        _write_json(file, saved | {BASE: now | ({COMMIT: commit} if commit else {})})
        return
    if changed := identity.differences(saved[BASE], now):
        raise UserError(
            f"the base model in {folder} has changed since the run in {workdir} began: "
            f"{changed}: restore it, or use another --workdir"
        )


def base_path(config: ConfigDict, workdir: pathlib.Path) -> str:
    """Returns `config.model.path`, of the hub at the commit that an earlier start of the run had.

    So a run goes on with its model when the hub has a newer one.
    """
    path, file = config.model.path, workdir / "config.json"
    commit = _read_json(file).get(BASE, {}).get(COMMIT) if file.exists() else None
    name, revision = hf.split_revision(path)
    return f"{name}@{commit}" if commit and revision is None else path


def _described(contents: dict[str, int | str] | None) -> str:
    """Returns a `fingerprint` in words."""
    if contents is None:
        return "none"
    return ", ".join(
        f"SHA-256 {str(value)[:12]}" if key == "sha256" else f"{value} {key}"
        for key, value in contents.items()
    )


def _as_json(config: ConfigDict) -> dict:
    return json.loads(config.to_json_best_effort())


def _read_json(file: pathlib.Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{file} is not readable JSON: restore it, or choose another --workdir"
        ) from None


def _write_json(file: pathlib.Path, contents: dict) -> None:
    try:
        files.write_text(file, json.dumps(contents, indent=2) + "\n")
    except OSError as error:
        raise _not_writable(file.parent, error) from None


def _not_writable(workdir: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {workdir} ({error.strerror}): choose another --workdir")


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their keys, joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
