"""The warm start: supervised tuning on demonstrations, at choice on relabelled ones.

`collab_jax/sft.py` is the command. Demonstrations that call at random cannot teach *when* to call.
With `config.sft.relabel_steps` the model is therefore tuned on them first, and then shown how good
it became: it answers training prompts that it was not tuned on, and where its own attempt fails,
the call is what it learns to end it with (`own_samples.py`). All prompts are labelled so, since
each half of them is answered by a model that was tuned on the other half.

What a start needs to go on is in WORKDIR/warm_start: the settings, and a folder for each tuning
with its metrics, checkpoints and samples.
"""

import itertools
import json
import pathlib
import shutil
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from collab_jax.models import decoder, hf, lora
from collab_jax.models import text as text_lib
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.sampler import Sampler
from collab_jax.models.text import Text
from collab_jax.rl import (
    claims,
    demonstrations,
    experiment,
    memory_check,
    memory_plan,
    own_samples,
    rollout,
)
from collab_jax.rl.demonstrations import Demonstration, Given
from collab_jax.rl.tuning import Source, Tuner
from collab_jax.runtime import files, hosts, parallel, split
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.process import GracefulStop
from collab_jax.tasks import Example, Task, base

FOLDER, FIGURES = "warm_start", "sft.json"  # in the workdir; the figures come last

# ------------------------------------------------------------------------------------ what is tuned


class WarmStart(NamedTuple):
    """The parts of a warm start."""

    config: ConfigDict
    workdir: pathlib.Path
    base_folder: pathlib.Path  # of the model that is tuned, as Hugging Face has it
    cfg: DecoderConfig  # with the adapter's scale, where there is one
    text: Text
    task: Task
    given: Given | None  # demonstrations of the task or of a file; None: they are the model's own
    examples: list[Example]  # training examples whose prompts fit
    check_examples: list[Example]  # to try the tuned model on
    sampler: Sampler
    params: Params  # what is tuned, before it is: the model, or an adapter; on the host
    frozen: Params | None  # the model that an adapter belongs to, with the axis D

    @property
    def folder(self) -> pathlib.Path:
        """What is needed to go on."""
        return self.workdir / FOLDER

    @property
    def respondent(self) -> own_samples.Respondent:
        """What answers prompts, with params of `model`."""
        return own_samples.Respondent(self.sampler, self.text, self.task, self.config)

    def model(self, params: Params) -> Params:
        """The whole model with these tuned params (on the host), with the axis D."""
        cut = experiment.cut_for_devices(self.config, params)
        joined = lora.join(self.frozen, parallel.replicate(cut))
        return experiment.gathering(self.cfg)(joined)


def is_finished(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Whether an earlier start has finished this warm start.

    Raises UserError where the workdir holds a warm start with other settings.
    """
    folder = workdir / FOLDER
    if not (folder / "config.json").exists():
        return False
    claims.claim(config, folder, unread=())
    return (workdir / FIGURES).exists()


def discard_checkpoints(workdir: pathlib.Path) -> None:
    """Removes the checkpoints of a finished warm start, if they are there."""
    for checkpoints in (workdir / FOLDER).glob("*/checkpoints"):
        shutil.rmtree(checkpoints)


def prepare(config: ConfigDict, workdir: pathlib.Path, task: Task) -> WarmStart:
    """The parts of the warm start of a config, with `workdir` claimed for it.

    The model is that of `config.model.path`, or one from nothing by `config.sft.architecture`,
    whose vocabulary is `config.sft.words`. Raises UserError with what to change; what is refused
    leaves no config.json, which would refuse the mended command.
    """
    folder = workdir / FOLDER
    claims.make_workdir(folder)
    nothing = bool(config.sft.architecture)
    base = _from_nothing(config, folder) if nothing else experiment.base_model(config, folder)
    config, cfg, text = base.config, base.cfg, base.text
    if config.sft.call_chance and text.decision_id is None:
        raise UserError(
            f"config.sft.call_chance={config.sft.call_chance:g} is that of a decision token, and "
            "this marker is plain text: set config.text.decision_token, or call_chance=0"
        )
    given = None
    if config.sft.source == "task":
        given = demonstrations.of_task(task, text, config)
    elif config.sft.source == "file":
        given = demonstrations.of_file(text, config, lambda: _train_prompts(task))
    train = experiment.load_split(task, text, config, "train")
    splits, check_examples = {"train": train}, []
    if config.sft.check_prompts:
        splits["validation"] = experiment.load_split(task, text, config, "validation")
        check_examples = splits["validation"].examples[: config.sft.check_prompts]
    machine = memory_check.this_machine()
    print(memory_check.check_fits(cfg, config, machine, memory_plan.WARM_START))
    whole = None if nothing else hf.load(base.folder, cfg, _stored_dtype(config))
    if whole is None:
        params = decoder.init(cfg, jax.random.key(config.seed))
    elif config.lora.rank:
        params = lora.start(cfg, whole, config.lora, config.seed, config.model.param_dtype)
    else:
        params = whole

    if not (folder / "config.json").exists():
        (workdir / FIGURES).unlink(missing_ok=True)  # of another warm start
    claims.claim(config, folder, unread=())
    claims.check_reward(config, folder)
    if not nothing:  # the settings, which are compared, say all of a model from nothing
        claims.check_base(folder, base.folder)
    for name, loaded in splits.items():
        claims.check_unchanged(folder, name, loaded.contents)
    if given and given.fingerprint:
        claims.check_unchanged(folder, "demonstrations", given.fingerprint)
    return WarmStart(
        config=config,
        workdir=workdir,
        base_folder=base.folder,
        cfg=cfg,
        text=text,
        task=task,
        given=given,
        examples=train.examples,
        check_examples=check_examples,
        sampler=rollout.make_sampler(
            cfg, text, config, group=config.group, temperature=config.temperature
        ),
        params=params,
        frozen=parallel.replicate(experiment.cut_for_devices(config, whole))
        if config.lora.rank
        else None,
    )


def _stored_dtype(config: ConfigDict) -> str:
    """That of the model's parameters: an adapter's model has the type of the computation."""
    return config.model.dtype if config.lora.rank else config.model.param_dtype


def _train_prompts(task: Task) -> dict[str, text_lib.Messages]:
    return {example.id: task.prompt(example) for example in task.load("train")}


def _from_nothing(config: ConfigDict, folder: pathlib.Path) -> experiment.BaseModel:
    """The model of `config.sft.architecture`, its config.json and tokenizer written to a folder."""
    if config.lora.rank:
        raise UserError("config.sft.architecture makes a model from nothing: set lora.rank=0")
    place = folder / "architecture"
    claims.make_workdir(place)
    hf_config = dict(config.sft.architecture)
    if hosts.is_first():  # the others prepare after it
        first_eos = config.text.eos[0]
        words = text_lib.word_tokenizer(config.sft.words, config.text.pad, first_eos, "<unk>")
        words.save_pretrained(place)
        written = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
        files.write_text(place / "config.json", written)
    cfg = hf.config_from_hf(hf_config, config.model.dtype, config.train.remat)
    config = config.copy_and_resolve_references()
    text = text_lib.load(place, config.text)
    config.text.update(text.special._asdict())
    return experiment.BaseModel(config, place, cfg, text)


def write(start: WarmStart, params: Params) -> None:
    """Writes the tuned model to the workdir, or the tuned adapter, as PEFT has it.

    All hosts call this, and the first writes.
    """
    divided = split.over(start.frozen) is not None
    base = parallel.unreplicate(start.frozen) if divided or hosts.is_first() else None
    with hosts.first_alone("that the tuned model is written", hosts.FOREVER):
        if hosts.is_first():
            _write(start, params, base)


def _write(start: WarmStart, params: Params, base: Params | None) -> None:
    config = start.config
    if config.lora.rank:
        assert base is not None
        name, _ = hf.split_revision(config.model.path)
        revision = hf.commit(start.base_folder)
        lora.save(start.workdir, params, start.cfg, base, config.lora, name=name, revision=revision)
    else:
        hf_config, dtype = hf.read_config(start.base_folder), config.model.param_dtype
        hf.save(start.workdir, params, hf_config, dtype, start.base_folder)


# --------------------------------------------------------------------------------- on what, and how


def tuned(start: WarmStart, stop: GracefulStop) -> Params:
    """The params after the warm start that the config describes, on the host.

    `stop` may end the process, with what is done so far saved.
    """
    config, tuner = start.config, Tuner(start.cfg, start.frozen, start.text, start.config, stop)
    if start.given is None:
        file = start.folder / "samples.jsonl"
        own = _answered(start, start.params, start.examples[: config.sft.prompts or None], file)
        source = _endless(start, _own_demonstrations(start, own))
    elif config.sft.relabel_steps:
        source = _relabelled(start, start.given, tuner)
    else:
        source = start.given.stream
    return tuner.tune(start.folder / "tuning", start.params, source, config.sft.steps)


def _endless(start: WarmStart, items: list[Demonstration]) -> Source:
    """Those of the demonstrations that fit, over and over; prints how many do."""
    kept = demonstrations.drop_too_long(items, start.text, start.config)
    return lambda: demonstrations.endless(kept, start.config.seed)


def _relabelled(start: WarmStart, given: Given, tuner: Tuner) -> Source:
    """The given demonstrations that answer, and the model's own after a tuning on the other half.

    As many given ones as the last tuning takes.
    """
    sft = start.config.sft

    def answers(one: Demonstration) -> bool:
        return not (one.call_only or base.called(one.response, start.text.marker))

    def half_of(prompt: text_lib.Messages) -> int:
        return demonstrations.half_of(prompt, start.task.template)

    judged = []
    for half in (0, 1):
        folder = start.folder / f"half-{half}"
        shown = given.only(
            lambda one: answers(one) and half_of(one.prompt) == half,  # noqa: B023
            f"of half {half}",
        )
        params = tuner.tune(folder, start.params, shown, sft.relabel_steps)
        others = [
            example
            for example in start.examples[: sft.prompts or None]
            if half_of(start.task.prompt(example)) != half
        ]
        judged += _answered(start, params, others, folder / "samples.jsonl")
    wanted = sft.steps * sft.batch_size
    as_given = list(itertools.islice(given.only(answers, "answers")(), wanted))
    return _endless(start, [*as_given, *_own_demonstrations(start, judged)])


def _answered(
    start: WarmStart, params: Params, examples: list[Example], file: pathlib.Path
) -> list[own_samples.JudgedPrompt]:
    """What the model with `params` makes of these training prompts."""
    return own_samples.sample_and_judge(start.respondent, start.model(params), examples, file)


def _own_demonstrations(
    start: WarmStart, judged: list[own_samples.JudgedPrompt]
) -> list[Demonstration]:
    """The demonstrations made of judged samples, also written to demonstrations.jsonl.

    The file is there to be looked at and to be used again (config.sft.source=file).
    """
    config, path = start.config, start.workdir / "demonstrations.jsonl"
    rows = own_samples.choose(judged, config.sft.marker_share, start.text, config.seed)
    with hosts.first_alone(f"that {path.name} is written"):
        if hosts.is_first():
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return demonstrations.read(path, start.text.marker, lambda: _train_prompts(start.task))
