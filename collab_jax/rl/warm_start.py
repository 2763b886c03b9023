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
import math
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from collab_jax.models import decoder, hf, lora
from collab_jax.models import text as text_lib
from collab_jax.models.decoder import DecoderConfig, Params
from collab_jax.models.sampler import Sampler
from collab_jax.models.text import Text
from collab_jax.rl import demonstrations, experiment, own_samples, rollout
from collab_jax.rl.demonstrations import Demonstration
from collab_jax.rl.tuning import Source, Tuner
from collab_jax.runtime import files, parallel
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.process import GracefulStop
from collab_jax.tasks import Example, Task, base

SOURCES = ("task", "file", "self")
FOLDER = "warm_start"  # in the workdir
LOOKED_AT = 1000  # demonstrations of an endless stream that are counted before it is used

# ----------------------------------------------------------------------------------------- settings


def check_warm_start(config: ConfigDict) -> None:
    """Raises UserError for settings that no warm start could use, with the fix."""
    experiment.check_config(config)
    _check_source(config.sft)
    _check_tuning(config.sft)


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_source(sft: ConfigDict) -> None:
    """Raises UserError for settings about where demonstrations come from."""
    _need(sft.source in SOURCES, f"config.sft.source={sft.source!r}: use one of {SOURCES}")
    _need(
        sft.source != "self" or sft.relabel_steps == 0,
        "config.sft.source=self labels the model's own responses as it is: relabel_steps tunes it "
        "before, on demonstrations of the task or of a file",
    )
    _need(
        (sft.source == "file") == bool(sft.demonstrations),
        f"config.sft.source={sft.source!r}, demonstrations={sft.demonstrations!r}: "
        "source=file names a file, the others none",
    )
    _need(sft.keep >= 1, "config.sft.keep must be at least 1")
    _need(
        0 <= sft.marker_share < 1, f"config.sft.marker_share={sft.marker_share} must lie in [0, 1)"
    )
    _need(sft.prompts >= 0, "config.sft.prompts must be at least 0")


def _check_tuning(sft: ConfigDict) -> None:
    """Raises UserError for settings about the updates and the try after them."""
    _need(
        sft.steps >= 1,
        "config.sft.steps must be at least 1: start from a config such as "
        "configs/countdown_tiny_sft.py",
    )
    devices = jax.local_device_count()
    _need(
        sft.batch_size >= 1 and sft.batch_size % devices == 0,
        f"config.sft.batch_size={sft.batch_size} must be a positive multiple of the {devices} "
        "devices",
    )
    for key in ("micro_rows", "checkpoint_every"):
        _need(sft[key] >= 1, f"config.sft.{key}={sft[key]} must be at least 1")
    _need(
        sft.relabel_steps >= 0,
        f"config.sft.relabel_steps={sft.relabel_steps} must be at least 0: 0 relabels nothing",
    )
    _need(
        0 <= sft.learning_rate < math.inf,
        f"config.sft.learning_rate={sft.learning_rate} must be finite, at least 0",
    )
    _need(sft.check_prompts >= 0, "config.sft.check_prompts must be at least 0")


# ------------------------------------------------------------------------------------ what is tuned


class WarmStart(NamedTuple):
    """The parts of a warm start."""

    config: ConfigDict
    workdir: pathlib.Path
    base_folder: pathlib.Path  # of the model that is tuned, as Hugging Face has it
    cfg: DecoderConfig  # with the adapter's scale, where there is one
    text: Text
    task: Task
    examples: list[Example]  # training examples whose prompts fit
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
        return lora.join(self.frozen, parallel.replicate(params))


def prepare(config: ConfigDict, workdir: pathlib.Path, task: Task) -> WarmStart:
    """The parts of the warm start of a config, with `workdir` claimed for it.

    The model is that of `config.model.path`, or one from nothing by `config.sft.architecture`,
    whose vocabulary is `config.sft.words`. Raises UserError with what to change.
    """
    folder = workdir / FOLDER
    experiment.make_workdir(folder)
    base = _from_nothing(config, folder) if config.sft.architecture else None
    base = base or experiment.base_model(config, folder)
    config, cfg = base.config, base.cfg
    if not (folder / "config.json").exists():
        (workdir / "sft.json").unlink(missing_ok=True)  # of another warm start
    experiment.claim(config, folder)
    if not config.sft.architecture:  # the settings, which are compared, describe all of that one
        experiment.check_base(folder, base.folder)
    examples = experiment.checked_examples(folder, task, base.text, config, "train")
    frozen = None
    if config.lora.rank:
        whole = hf.load(base.folder, cfg, config.model.dtype)
        params = lora.start(cfg, whole, config.lora, config.seed, config.model.param_dtype)
        frozen = parallel.replicate(whole)
    elif config.sft.architecture:
        params = decoder.init(cfg, jax.random.key(config.seed))
    else:
        params = hf.load(base.folder, cfg, config.model.param_dtype)
    sampler = rollout.make_sampler(
        cfg, base.text, config, group=config.group, temperature=config.temperature
    )
    return WarmStart(
        config=config,
        workdir=workdir,
        base_folder=base.folder,
        cfg=cfg,
        text=base.text,
        task=task,
        examples=examples,
        sampler=sampler,
        params=params,
        frozen=frozen,
    )


def _from_nothing(config: ConfigDict, folder: pathlib.Path) -> experiment.BaseModel:
    """The model of `config.sft.architecture`, its config.json and tokenizer written to a folder."""
    if config.lora.rank:
        raise UserError("config.sft.architecture makes a model from nothing: set lora.rank=0")
    place = folder / "architecture"
    experiment.make_workdir(place)
    words = text_lib.word_tokenizer(config.sft.words, config.text.pad, config.text.eos[0], "<unk>")
    words.save_pretrained(place)
    hf_config = dict(config.sft.architecture)
    files.write_text(place / "config.json", json.dumps(hf_config, indent=2, sort_keys=True) + "\n")
    cfg = hf.config_from_hf(hf_config, config.model.dtype, config.train.remat)
    config = config.copy_and_resolve_references()
    text = text_lib.load(place, config.text)
    config.text.update(text.special._asdict())
    return experiment.BaseModel(config, place, cfg, text)


def check_examples(start: WarmStart) -> list[Example]:
    """The prompts to try the tuned model on: `sft.check_prompts` of the validation split.

    Of a task that has none, the last training prompts.
    """
    count, task = start.config.sft.check_prompts, start.task
    if "validation" not in task.splits:
        return start.examples[len(start.examples) - count :]
    held_out = experiment.checked_examples(
        start.folder, task, start.text, start.config, "validation"
    )
    return held_out[:count]


def write(start: WarmStart, params: Params) -> None:
    """Writes the tuned model to the workdir, or the tuned adapter, as PEFT has it."""
    config = start.config
    if config.lora.rank:
        name, _ = hf.split_revision(config.model.path)
        revision = hf.commit(start.base_folder)
        base = parallel.unreplicate(start.frozen)
        lora.save(start.workdir, params, start.cfg, base, config.lora, name=name, revision=revision)
    else:
        hf_config, dtype = hf.read_config(start.base_folder), config.model.param_dtype
        hf.save(start.workdir, params, hf_config, dtype, start.base_folder)
    for checkpoints in start.folder.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)


# --------------------------------------------------------------------------------- on what, and how


def tuned(start: WarmStart, stop: GracefulStop) -> Params:
    """The params after the warm start that the config describes, on the host.

    `stop` may end the process, with what is done so far saved.
    """
    config, tuner = start.config, Tuner(start.cfg, start.frozen, start.text, start.config, stop)
    if config.sft.source == "self":
        file = start.folder / "samples.jsonl"
        examples = start.examples[: config.sft.prompts or None]
        judged = _answered(start, start.params, examples, file)
        source = _endless(start, _own_demonstrations(start, judged))
    else:
        source = _given(start)
        if config.sft.relabel_steps:
            source = _relabelled(start, tuner, source)
    return tuner.tune(start.folder / "tuning", start.params, source, config.sft.steps)


def _given(start: WarmStart) -> Source:
    """The demonstrations of the task, or of the file that the config names."""
    config, task = start.config, start.task
    if config.sft.source == "file":
        path = pathlib.Path(config.sft.demonstrations).expanduser()
        read = demonstrations.read(path, lambda: _train_prompts(start))
        lines = (json.dumps(one) for one in read)
        contents = {path.name: experiment.fingerprint(lines, "demonstrations")}
        experiment.check_unchanged(start.folder, "demonstrations", contents)
        return _endless(start, read)
    make = task.demonstrations
    assert make is not None  # the command has checked it

    def stream() -> Iterator[Demonstration]:
        pairs = make(config.seed)
        return (Demonstration(task.prompt(example), response) for example, response in pairs)

    first = list(itertools.islice(stream(), LOOKED_AT))
    demonstrations.drop_too_long(first, start.text, config)
    return stream


def _endless(start: WarmStart, items: list[Demonstration]) -> Source:
    """Those of the demonstrations that fit, over and over; prints how many do."""
    kept = demonstrations.drop_too_long(items, start.text, start.config)
    return lambda: demonstrations.endless(kept, start.config.seed)


def _relabelled(start: WarmStart, tuner: Tuner, given: Source) -> Source:
    """The given demonstrations that answer, and the model's own after a tuning on the other half.

    As many given ones as there are training examples.
    """
    sft, marker = start.config.sft, start.text.marker

    def answers() -> Iterator[Demonstration]:
        return (one for one in given() if not base.called(one.response, marker))

    judged = []
    for half in (0, 1):
        folder = start.folder / f"half-{half}"
        own = lambda: (d for d in answers() if demonstrations.half_of(d.prompt) == half)  # noqa: B023, E731
        params = tuner.tune(folder, start.params, own, sft.relabel_steps)
        others = [
            example
            for example in start.examples[: sft.prompts or None]
            if demonstrations.half_of(start.task.prompt(example)) != half
        ]
        judged += _answered(start, params, others, folder / "samples.jsonl")
    as_given = list(itertools.islice(answers(), len(start.examples)))
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
    rows = own_samples.choose(judged, config.sft.marker_share, start.text.marker, config.seed)
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return demonstrations.read(path, lambda: _train_prompts(start))


def _train_prompts(start: WarmStart) -> dict[str, text_lib.Messages]:
    return {example.id: start.task.prompt(example) for example in start.task.load("train")}
