"""What a run is made of: the parts that its config describes, its data, its state.

Shared by the commands that train, evaluate and export.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import optax
from ml_collections import ConfigDict

from collab_jax import gapg
from collab_jax.cloud import CachedCloud, make_cloud
from collab_jax.cloud.far import FarCloud
from collab_jax.gapg import TrainState
from collab_jax.models import blocks, decoder, hf, lora
from collab_jax.models import text as text_lib
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.text import Text
from collab_jax.rl import claims, optim
from collab_jax.rl.settings import check_config
from collab_jax.runtime import files, hosts, parallel, process, split
from collab_jax.runtime.checkpoint import Checkpoints
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import Example, Task, judge, make_task

CHECKPOINTS = "checkpoints"  # the folder of a run's states


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


# ---- the parts


def store_path(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Returns the file that keeps the cloud's answers."""
    if config.cloud.store:
        return pathlib.Path(config.cloud.store).expanduser()
    return workdir / "cloud.sqlite"


def task_and_cloud(config: ConfigDict, store: pathlib.Path) -> tuple[Task, CachedCloud]:
    """Returns the task (with its judge, if any) and the cloud; `store` keeps what they buy.

    Of several hosts only the first has the store; the others sample and judge, and no more.
    """
    task = make_task(config)
    if not hosts.is_first():
        return task, cast(CachedCloud, FarCloud())
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
    folder = hf.locate(claims.base_path(config, workdir))
    cfg = hf.config_from_hf(hf.read_config(folder), config.model.dtype, remat=config.train.remat)
    config = claims.with_tokens_of(config, workdir)
    text = text_lib.load(folder, config.text)
    cfg = lora.configure(cfg, config.lora, text.decision_id)
    config.text.update(text.special._asdict())
    return BaseModel(config, folder, cfg, text)


@contextlib.contextmanager
def prepared_in_turn(config: ConfigDict, workdir: pathlib.Path) -> Iterator[None]:
    """The body prepares a run, on the first host and then on the others.

    Raises UserError where the hosts differ in code or settings, or do not share `workdir`.
    """
    # It may change between two starts, and not between the hosts of one.
    sharded = {"train.sharded": config.train.sharded}
    hosts.check_same(
        "its settings", {"code": process.code()} | claims.settings_of(config) | sharded
    )
    with hosts.first_alone("that its run is prepared", hosts.FOREVER):  # it may fetch a model
        if not hosts.is_first():
            claims.check_shared(workdir)
        yield


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """`files.held`, for a run: of several hosts the first holds it for all."""
    with files.held(workdir) if hosts.is_first() else contextlib.nullcontext():
        yield


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Returns the run of a config, with `workdir` claimed for it.

    The config of the run has the special tokens by name, as config.json has them.
    Raises UserError with what to change. What is refused leaves no config.json, which would refuse
    the mended command, and might hold a misplaced key.
    """
    check_config(config)
    claims.make_workdir(workdir)
    base = base_model(config, workdir)
    config, folder = base.config, base.folder
    task, cloud = task_and_cloud(config, store_path(config, workdir))
    claims.claim(config, workdir)
    claims.check_base(workdir, folder)
    claims.check_reward(config, workdir)
    return Run(
        config=config,
        workdir=workdir,
        folder=folder,
        cfg=base.cfg,
        text=base.text,
        task=task,
        cloud=cloud,
        optimizer=make_optimizer(config),
        checkpoints=Checkpoints(workdir / CHECKPOINTS),
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of a run."""
    schedule = optim.make_schedule(
        config.optim.learning_rate,
        config.optim.warmup_steps,
        decay_steps=config.train.steps if config.optim.decay else None,
    )
    return optim.make_optimizer(
        schedule,
        config.optim.weight_decay,
        optim.unit_norm(),
        config.model.param_dtype,
        config.optim.momentum,
    )


def with_task_and_cloud_of(run: Run, config: ConfigDict) -> Run:
    """Returns `run` with another config and its task and cloud: one model, other questions."""
    task, cloud = task_and_cloud(config, store_path(config, run.workdir))
    return run._replace(config=config, task=task, cloud=cloud)


# ---- the data


def examples(run: Run, split: str) -> list[Example]:
    """Returns the examples of a split of the run's task whose prompts fit.

    Raises UserError where the data of the split are not those of an earlier start of the run.
    """
    loaded = load_split(run.task, run.text, run.config, split)
    claims.check_unchanged(run.workdir, split, loaded.contents)
    return loaded.examples


class Split(NamedTuple):
    """The examples of a split whose prompts fit, and the fingerprint of all, by task."""

    examples: list[Example]
    contents: dict[str, dict]


def load_split(task: Task, text: Text, config: ConfigDict, split: str) -> Split:
    """Returns a split of a task. Raises UserError where no prompt fits `config.prompt_length`."""
    loaded = task.load(split)
    tasks = dict.fromkeys(example.task for example in loaded)
    contents = {name: files.fingerprint(_lines(loaded, name), "examples") for name in tasks}
    return Split(drop_too_long(loaded, task, text, config.prompt_length, split), contents)


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


def first_state(
    config: ConfigDict, optimizer: optax.GradientTransformation, params: Params
) -> TrainState:
    """Returns the state before the first step, with nothing frozen."""
    return gapg.init_state(
        params,
        optimizer,
        gapg.init_reward(
            config.reward.alpha_a, config.reward.alpha_c, config.reward.alpha_f, config.task.budgets
        ),
        gapg.init_filter(config.budget, config.task.budgets),
        averaged=config.optim.average > 0,
    )


def state_on_devices(run: Run) -> TrainState:
    """Returns `load_state` with axis D."""
    return parallel.replicate(cut_state(run.config, load_state(run), jax.device_count()))


def cut_state(config: ConfigDict, state: TrainState, devices: int) -> TrainState:
    """Returns the state with all that has the shapes of parameters as `cut_for_devices` has it."""
    cut = functools.partial(cut_for_devices, config, devices=devices)
    return state.replace(
        params=cut(state.params),
        opt_state=cut(state.opt_state),
        average=cut(state.average),
        frozen=cut(state.frozen),
    )


def cut_for_devices(config: ConfigDict, tree: Any, devices: int | None = None) -> Any:
    """Returns parameters, or what has their shapes, for `parallel.replicate` to copy.

    Where `config.train.sharded` says so, they are divided over so many devices, or over all of the
    job.
    """
    if not config.train.sharded:
        return tree
    return blocks.divided(tree, devices or jax.device_count(), parallel.AXIS)


def gathering(cfg: DecoderConfig) -> Callable[[Params], Params]:
    """Returns gathered(params) -> the whole model on each device, which samples; both with axis D.

    Where parameters are divided, it is in the type of the computation, and all hosts of the job
    call it; else they are returned as they are.
    """
    program = parallel.Program(lambda params: decoder.whole(params, cfg))

    def gathered(params: Params) -> Params:
        if split.over(params) is None:
            return params
        # Host devices that wait in the collectives of two programs at once can lock.
        return program(jax.block_until_ready(params))

    return gathered


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
    state = first_state(config, run.optimizer, params)
    if run.checkpoints.latest() is None:
        return jax.device_get(state).replace(frozen=frozen)
    return run.checkpoints.restore(like=state).replace(frozen=frozen)
