"""What a run is made of: its workdir, the parts that its config describes, its data, its state.

Shared by the commands that train, evaluate and export.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.cloud import CachedCloud, make_cloud
from collab_jax.gapg import TrainState
from collab_jax.models import decoder, hf, identity, lora, special_tokens
from collab_jax.models import text as text_lib
from collab_jax.models.text import Text
from collab_jax.rl import optim
from collab_jax.rl.settings import check_config
from collab_jax.runtime import files
from collab_jax.runtime.checkpoint import Checkpoints
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task, judge, make_task

# What may differ between two starts of one run: how the cloud is bought from, not what it answers,
# and how many of its verdicts an evaluation can do without.
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
    "eval.max_unknown",
}
DATA = "data"  # the entry of config.json, beside the settings, that says what data the run has seen
REWARD = "reward"  # in it, the file of `config.task.reward`; the other names are splits
BASE = "base"  # the entry that says which model the run began with: its `identity.fingerprint`
COMMIT = "commit"  # in it, the commit of a model of the hub


class Run(NamedTuple):
    """The parts of a run. `folder` is the Hugging Face folder that it starts from."""

    config: ConfigDict
    workdir: pathlib.Path
    folder: pathlib.Path
    cfg: decoder.DecoderConfig
    text: Text
    task: Task
    cloud: CachedCloud
    optimizer: optax.GradientTransformation
    checkpoints: Checkpoints


# ---- the workdir: config.json says which settings, data and base model its run has


def make_workdir(workdir: pathlib.Path) -> None:
    """Makes the folder if it is absent. Raises UserError where that cannot be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(workdir, error) from None


def claim(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, or raises UserError where `workdir` holds a run with other settings."""
    file = workdir / "config.json"
    if not file.exists():
        _write_json(file, _as_json(config))
    if differing := differences(file, config):
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


def differences(file: pathlib.Path, config: ConfigDict, all_keys: bool = True) -> str:
    """Returns how the settings in `file`, a config.json, differ from `config`: five of them, or "".

    Those of MAY_DIFFER_ON_RESUME do not count, nor special tokens that `config` leaves to be found,
    and without `all_keys` only keys that both have.
    Raises UserError where the file cannot be read.
    """
    then, now = _flat(_read_json(file)), _flat(_as_json(config))
    # A run begun before providers had a name bought from its base_url; one before `task.system` had
    # the chat template's own.
    then.setdefault("cloud.provider", then.get("cloud.base_url"))
    then.setdefault("cloud.error_skew", 0.0)
    then.setdefault("task.system", "")
    keys = then.keys() | now.keys() if all_keys else then.keys() & now.keys()
    left_to_be_found = {
        f"text.{key}"
        for key in special_tokens.SpecialTokens._fields
        if special_tokens.is_auto(config.text[key])
    }
    differing = [
        f"{key}={then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(keys - MAY_DIFFER_ON_RESUME - left_to_be_found)
        if then.get(key) != now.get(key) and not key.startswith((f"{DATA}.", f"{BASE}."))
    ]
    return "; ".join(differing[:5])


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


def fingerprint(lines: Iterable[str], unit: str) -> dict[str, int | str]:
    """Returns how many lines there are, by the name of their unit, and the SHA-256 of them all."""
    digest, count = hashlib.sha256(), 0
    for line in lines:
        digest.update(f"{len(line)}:{line}".encode())
        count += 1
    return {unit: count, "sha256": digest.hexdigest()}


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


# ---- the parts


def store_path(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Returns the file that keeps the cloud's answers."""
    if config.cloud.store:
        return pathlib.Path(config.cloud.store).expanduser()
    return workdir / "cloud.sqlite"


def task_and_cloud(config: ConfigDict, store: pathlib.Path) -> tuple[Task, CachedCloud]:
    """Returns the task (with its judge, if any) and the cloud; `store` keeps what they buy."""
    task = make_task(config)
    cloud = make_cloud(config, task, store)
    return judge.judged(config, task, store), cloud


class BaseModel(NamedTuple):
    """The model of `config.model.path`. config: a copy, in which no special token is "auto"."""

    config: ConfigDict
    folder: pathlib.Path  # as Hugging Face has it
    cfg: decoder.DecoderConfig
    text: Text


def base_model(config: ConfigDict, workdir: pathlib.Path) -> BaseModel:
    """Returns the model that a config starts from; what an earlier start in `workdir` noted holds.

    That is the commit of a model of the hub, and special tokens that the config leaves to be found.
    Raises UserError for an adapter that does not go with the model.
    """
    folder = hf.locate(base_path(config, workdir))
    cfg = hf.config_from_hf(hf.read_config(folder), config.model.dtype, remat=config.train.remat)
    config = with_tokens_of(config, workdir)
    text = text_lib.load(folder, config.text)
    cfg = lora.configure(cfg, config.lora, text.decision_id)
    config.text.update(text.special._asdict())
    return BaseModel(config, folder, cfg, text)


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Returns the run of a config, with `workdir` claimed for it.

    The config of the run has the special tokens by name, as config.json has them.
    Raises UserError with what to change. What is refused leaves no config.json, which would refuse
    the mended command, and might hold a misplaced key.
    """
    check_config(config)
    make_workdir(workdir)
    base = base_model(config, workdir)
    config, folder = base.config, base.folder
    task, cloud = task_and_cloud(config, store_path(config, workdir))
    claim(config, workdir)
    check_base(workdir, folder)
    if config.task.reward:
        source = pathlib.Path(config.task.reward.rpartition(":")[0]).expanduser()
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        check_unchanged(workdir, REWARD, {source.name: fingerprint(lines, "lines")})
    schedule = optim.make_schedule(
        config.optim.learning_rate,
        config.optim.warmup_steps,
        decay_steps=config.train.steps if config.optim.decay else None,
    )
    return Run(
        config=config,
        workdir=workdir,
        folder=folder,
        cfg=base.cfg,
        text=base.text,
        task=task,
        cloud=cloud,
        optimizer=optim.make_optimizer(
            schedule, config.optim.weight_decay, config.optim.clip_norm, config.model.param_dtype
        ),
        checkpoints=Checkpoints(workdir / "checkpoints"),
    )


def with_task_and_cloud_of(run: Run, config: ConfigDict) -> Run:
    """Returns `run` with another config and its task and cloud: one model, other questions."""
    task, cloud = task_and_cloud(config, store_path(config, run.workdir))
    return run._replace(config=config, task=task, cloud=cloud)


# ---- the data


def examples(run: Run, split: str) -> list[Example]:
    """Returns the run's `checked_examples` of a split of its task."""
    return checked_examples(run.workdir, run.task, run.text, run.config, split)


def checked_examples(
    workdir: pathlib.Path, task: Task, text: Text, config: ConfigDict, split: str
) -> list[Example]:
    """Returns the examples of a split whose prompts fit into `config.prompt_length`.

    Raises UserError where the data of the split are not those of an earlier start in `workdir`.
    """
    loaded = task.load(split)
    tasks = dict.fromkeys(example.task for example in loaded)
    contents = {name: fingerprint(_lines(loaded, name), "examples") for name in tasks}
    check_unchanged(workdir, split, contents)
    return drop_too_long(loaded, task, text, config.prompt_length, split)


def _lines(loaded: Sequence[Example], task: str) -> Iterator[str]:
    """Yields what is in each example of a task; `problem` holds its text and its answer."""
    for example in loaded:
        if example.task == task:
            contents = [example.id, example.stratum, example.problem]
            yield json.dumps(contents, sort_keys=True, default=str)


def drop_too_long(
    loaded: Sequence[Example], task: Task, text: Text, prompt_length: int, split: str
) -> list[Example]:
    """Returns the examples whose prompts have at most `prompt_length` tokens; none is cut.

    Prints how many were left out. Raises UserError where none is left.
    """
    kept = [e for e in loaded if len(text.prompt_ids(task.prompt(e))) <= prompt_length]
    if not kept:
        raise UserError(
            f"all {len(loaded)} {split} prompts have more than {prompt_length} tokens: "
            "raise config.prompt_length"
        )
    if len(kept) < len(loaded):
        print(
            f"left out: {len(loaded) - len(kept)} of {len(loaded)} {split} prompts have more than "
            f"config.prompt_length={prompt_length} tokens"
        )
    return kept


# ---- the state


def load_state(run: Run) -> TrainState:
    """Returns the state of the last checkpoint, or the one before the first step; on the host.

    No checkpoint holds the frozen parameters (under LoRA, all but the adapter): they are read from
    the model's folder, in the type of the computation. They would be used in that type anyway, and
    so no other copy is kept.
    """
    config = run.config
    if config.lora.rank:
        frozen = hf.load(run.folder, run.cfg, config.model.dtype)
        params = lora.start(run.cfg, frozen, config.lora, config.seed, config.model.param_dtype)
    else:
        params, frozen = hf.load(run.folder, run.cfg, config.model.param_dtype), None
    state = gapg.init_state(
        params,
        run.optimizer,
        gapg.init_reward(config.reward.alpha_a, config.reward.alpha_c, config.reward.alpha_f),
        gapg.init_filter(config.budget),
        averaged=config.optim.average > 0,
    )
    if run.checkpoints.latest() is None:
        return jax.device_get(state).replace(frozen=frozen)
    return run.checkpoints.restore(like=state).replace(frozen=frozen)
