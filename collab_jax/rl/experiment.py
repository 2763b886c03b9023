"""What a run is made of: its workdir, its parts built from the config, its state. Shared by train,
evaluate and export.
"""

import functools
import json
import math
import pathlib
from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.cloud import CachedCloud, make_cloud
from collab_jax.gapg import TrainState
from collab_jax.models import decoder, hf, lora
from collab_jax.models import text as text_lib
from collab_jax.models.text import Text
from collab_jax.rl import algorithms, optim
from collab_jax.runtime.checkpoint import Checkpoints
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task, judge, make_task

# What may differ between two starts of one run: how the cloud is bought from, not what it answers.
MAY_DIFFER_ON_RESUME = {
    f"cloud.{key}"
    for key in ("mode", "wait", "prefetch", "retries", "max_calls", "max_usd", "when_spent", "base_url", "key_env",
                "concurrency", "timeouts", "prices", "prices_date")
}  # fmt: skip


class Run(NamedTuple):
    """The parts of a run. `folder` is the Hugging Face folder it starts from."""

    config: ConfigDict
    workdir: pathlib.Path
    folder: pathlib.Path
    cfg: decoder.DecoderConfig
    text: Text
    task: Task
    cloud: CachedCloud
    optimizer: optax.GradientTransformation
    checkpoints: Checkpoints


def check_config(config: ConfigDict) -> None:
    """Raises UserError for values that no run could use, with the fix."""
    a, c, f = config.reward.alpha_a, config.reward.alpha_c, config.reward.alpha_f
    rate, algorithm, t = config.optim.learning_rate, config.algorithm, config.train
    devices = jax.local_device_count()

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    need(
        0 <= config.budget <= 0.999,
        f"config.budget={config.budget} must lie in [0, 1), 0.999 at most: the share of queries that may go to the cloud",
    )
    need(0 <= config.seed < 2**31, f"config.seed={config.seed} must lie in [0, 2**31)")
    need(
        config.group >= 2,
        f"config.group={config.group} must be at least 2: a group is compared with itself",
    )
    need(
        a > c > f >= 0 and math.isfinite(a),
        f"config.reward: alpha_a={a} > alpha_c={c} > alpha_f={f} >= 0 must hold",
    )
    need(
        config.temperature > 0,
        f"config.temperature={config.temperature} must be above 0: training samples",
    )
    need(
        0 <= config.optim.average <= 0.9999,
        f"config.optim.average={config.optim.average} must lie in [0, 0.9999]: 0 averages nothing",
    )
    need(0 <= rate < math.inf, f"config.optim.learning_rate={rate} must be finite and at least 0")
    need(
        min(config.prompt_length, config.max_new_tokens, t.steps) >= 1,
        "config.prompt_length, max_new_tokens and train.steps must be at least 1",
    )
    need(
        min(t.micro_rows, t.lengths, t.logprob_chunk, t.checkpoint_every, t.empty_d1_limit) >= 1,
        "config.train.micro_rows, lengths, logprob_chunk, checkpoint_every and empty_d1_limit must be at least 1",
    )
    need(
        min(config.decode.segments, config.decode.slot_counts) >= 1,
        "config.decode.segments and slot_counts must be at least 1",
    )
    need(
        min(config.eval.prompts, config.eval.fit_prompts) >= 0,
        "config.eval.prompts and fit_prompts must be at least 0",
    )
    need(
        config.eval.samples >= 1 and config.eval.temperature > 0,
        f"config.eval.samples={config.eval.samples} must be at least 1, temperature={config.eval.temperature} above 0",
    )
    need(
        config.eval.prompts or not config.eval.fit_prompts,
        "config.eval.fit_prompts needs config.eval.prompts as well",
    )
    need(
        min(config.routers.samples, config.routers.epochs) >= 1
        and 0 < config.routers.learning_rate < math.inf,
        "config.routers.samples and epochs must be at least 1, learning_rate finite and above 0",
    )
    need(
        config.eval.prompts or not config.routers.record,
        "config.routers.record needs config.eval.prompts as well",
    )
    pair = algorithm.solo == 0 or 2 <= algorithm.solo <= config.group - 2
    need(
        pair,
        f"config.algorithm.solo={algorithm.solo} must be 0, or leave at least two responses of each kind",
    )
    need(
        algorithm.solo == 0 or algorithm.advantage in ("gapg", "standard"),
        f"config.algorithm.solo={algorithm.solo} goes with advantage gapg or standard, whose sizes are alike",
    )
    need(
        algorithm.solo == 0 or config.text.decision_token,
        f"config.algorithm.solo={algorithm.solo} needs a config.text.decision_token: it bars one token",
    )
    need(
        algorithm.filter != "zero_variance" or algorithm.control != "lagrangian",
        "config.algorithm: zero_variance looks at rewards, not at what lagrangian charges for calls: use filter=none with it",
    )
    need(
        0 <= algorithm.control_rate < math.inf,
        "config.algorithm.control_rate must be finite and at least 0",
    )
    for name in ("model.dtype", "model.param_dtype", "decode.cache_dtype"):
        value = functools.reduce(getattr, name.split("."), config)
        need(
            value in ("float32", "bfloat16"),
            f"config.{name}={value!r}: use 'float32' or 'bfloat16'",
        )
    for key, known in algorithms.PARTS.items():
        need(
            algorithm[key] in known,
            f"config.algorithm.{key}={algorithm[key]!r}: use one of {sorted(known)}",
        )
    for name in ("prompts_per_step", "eval.batch_size", "routers.batch_size"):
        size = functools.reduce(getattr, name.split("."), config)
        need(
            size >= 1 and size % devices == 0,
            f"config.{name}={size} must be a positive multiple of the {devices} devices: change it, or config.cpu_devices",
        )


def make_workdir(workdir: pathlib.Path) -> None:
    """Makes the folder if it is absent. Raises UserError where that cannot be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror}): choose another --workdir"
        ) from None


def claim(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json to `workdir`; refuses a workdir begun with another config, naming the
    difference.
    """
    file = workdir / "config.json"
    try:
        if not file.exists():
            beside = file.with_suffix(".tmp")
            beside.write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n")
            beside.replace(file)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror}): choose another --workdir"
        ) from None
    if differing := differences(file, config):
        raise UserError(
            f"{workdir} holds a run with other settings ({differing}): use the same settings or another --workdir"
        )


def differences(file: pathlib.Path, config: ConfigDict, all_keys: bool = True) -> str:
    """How the settings in `file`, a config.json, differ from `config`: the first five, or "".

    MAY_DIFFER_ON_RESUME ones do not count, and without `all_keys` only those that both have. Raises UserError where
    the file cannot be read.
    """
    try:
        theirs = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{file} is not readable JSON: restore it, or choose another --workdir"
        ) from None
    old, new = _flat(theirs), _flat(json.loads(config.to_json_best_effort()))
    keys = sorted(
        (old.keys() | new.keys() if all_keys else old.keys() & new.keys()) - MAY_DIFFER_ON_RESUME
    )
    found = [
        f"{k}={old.get(k)!r} then, {new.get(k)!r} now" for k in keys if old.get(k) != new.get(k)
    ]
    return "; ".join(found[:5])


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {prefix + key: value}
        )
    return flat


def store_path(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """The file of the run's cloud answers."""
    return (
        pathlib.Path(config.cloud.store).expanduser()
        if config.cloud.store
        else workdir / "cloud.sqlite"
    )


def task_and_cloud(config: ConfigDict, store: pathlib.Path) -> tuple[Task, CachedCloud]:
    """The task, with its judge if it has one, and the cloud; both keep what they buy in the file
    `store`.
    """
    task = make_task(config)
    cloud = make_cloud(config, task, store)
    return judge.judged(config, task, store), cloud


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Checks the config, builds the parts and claims the workdir. Raises UserError with what to do.

    What is refused leaves no config.json, which would refuse the mended command, and might hold a
    misplaced key.
    """
    check_config(config)
    make_workdir(workdir)
    folder = hf.locate(config.model.path)
    cfg = hf.config_from_hf(hf.read_config(folder), config.model.dtype, remat=config.train.remat)
    cfg = lora.configure(cfg, config.lora)
    text = text_lib.load(folder, config.text)
    task, cloud = task_and_cloud(config, store_path(config, workdir))
    claim(config, workdir)
    steps, o = config.train.steps, config.optim
    schedule = optim.make_schedule(
        o.learning_rate, o.warmup_steps, decay_steps=steps if o.decay else None
    )
    return Run(
        config=config,
        workdir=workdir,
        folder=folder,
        cfg=cfg,
        text=text,
        task=task,
        cloud=cloud,
        optimizer=optim.make_optimizer(
            schedule, o.weight_decay, o.clip_norm, config.model.param_dtype
        ),
        checkpoints=Checkpoints(workdir / "checkpoints"),
    )


def with_config(run: Run, config: ConfigDict) -> Run:
    """`run` with the task and the cloud of another config: the same model, asked something else."""
    task, cloud = task_and_cloud(config, store_path(config, run.workdir))
    return run._replace(config=config, task=task, cloud=cloud)


def fitting(task: Task, text: Text, config: ConfigDict, split: str) -> list[Example]:
    """The examples of a split, "train" or "test", whose prompts have at most `config.prompt_length`
    tokens.

    The others are told and left out, never cut. Raises UserError where none is left.
    """
    found, limit = task.load(split), config.prompt_length
    fitting = [e for e in found if len(text.prompt_ids(task.prompt(e))) <= limit]
    if not fitting:
        raise UserError(
            f"all {len(found)} {split} prompts have more than {limit} tokens: raise config.prompt_length"
        )
    if len(fitting) < len(found):
        print(
            f"left out: {len(found) - len(fitting)} of {len(found)} {split} prompts have more than "
            f"config.prompt_length={limit} tokens"
        )
    return fitting


def examples(run: Run, split: str) -> list[Example]:
    """`fitting` of a run's parts."""
    return fitting(run.task, run.text, run.config, split)


def load_state(run: Run) -> TrainState:
    """The state of the last checkpoint, or the one before the first step; on the host. What is
    frozen is the folder's.

    Frozen parameters come in the computation's type, in which they would be used anyway: no other
    copy is kept.
    """
    config = run.config
    if config.lora.rank:
        params = lora.init(
            run.cfg, config.lora, jax.random.key(config.seed), config.model.param_dtype
        )
        frozen = hf.load(run.folder, run.cfg, config.model.dtype)
    else:
        params, frozen = hf.load(run.folder, run.cfg, config.model.param_dtype), None
    alphas = config.reward.alpha_a, config.reward.alpha_c, config.reward.alpha_f
    parts = run.optimizer, gapg.init_reward(*alphas), gapg.init_filter(config.budget)
    state = gapg.init_state(params, *parts, averaged=config.optim.average > 0)
    restored = (
        jax.device_get(state)
        if run.checkpoints.latest() is None
        else run.checkpoints.restore(like=state)
    )
    return restored.replace(frozen=frozen)
