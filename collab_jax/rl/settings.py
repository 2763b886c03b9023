"""Checks of the settings: what no run could use is refused before anything is spent."""

import functools
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from collab_jax.rl import algorithms
from collab_jax.runtime import hosts
from collab_jax.runtime.errors import UserError

SOURCES = ("task", "file", "self")  # of demonstrations


def check_config(config: ConfigDict, devices: int | None = None) -> None:
    """Raises UserError for settings that no run could use, with what to change.

    devices: how many it would run on, of one host; None: those that are there.
    """
    if devices is None and hosts.count() > 1:
        _check_hosts(config)
    _check_rollout(config)
    _check_reward(config)
    _check_algorithm(config)
    _check_optim(config)
    _check_train(config)
    _check_eval(config)
    _check_routers(config)
    _check_adapter(config)
    _check_number_types(config)
    _check_batches(config, jax.device_count() if devices is None else devices)


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_adapter(config: ConfigDict) -> None:
    _need(
        config.lora.rank > 0 or not config.lora.start,
        f"config.lora.start={config.lora.start!r} is an adapter, and config.lora.rank=0 trains "
        "none: set the rank to its own",
    )


def _check_hosts(config: ConfigDict) -> None:
    """What several hosts cannot do yet."""
    _need(
        not config.task.judge,
        "config.task.judge works on one host: start one, or leave the answers to the verifier",
    )


def _check_rollout(config: ConfigDict) -> None:
    """The budget, the seed, and how responses are sampled."""
    _need(
        0 <= config.budget <= 0.999,
        f"config.budget={config.budget} must lie in [0, 1), 0.999 at most: the share of queries "
        "that may go to the cloud",
    )
    _need(0 <= config.seed < 2**31, f"config.seed={config.seed} must lie in [0, 2**31)")
    _need(
        config.group >= 2,
        f"config.group={config.group} must be at least 2: a group is compared with itself",
    )
    _need(
        config.temperature > 0,
        f"config.temperature={config.temperature} must be above 0: training samples",
    )
    _need(
        min(config.prompt_length, config.max_new_tokens) >= 1,
        "config.prompt_length and max_new_tokens must be at least 1",
    )
    _need(
        min(config.decode.segments, config.decode.slot_counts) >= 1,
        "config.decode.segments and slot_counts must be at least 1",
    )


def _check_reward(config: ConfigDict) -> None:
    reward = config.reward
    _need(
        reward.alpha_a > reward.alpha_c > reward.alpha_f >= 0 and math.isfinite(reward.alpha_a),
        f"config.reward: alpha_a={reward.alpha_a} > alpha_c={reward.alpha_c} > "
        f"alpha_f={reward.alpha_f} >= 0 must hold",
    )


def _check_algorithm(config: ConfigDict) -> None:
    algorithm = config.algorithm
    for key, known in algorithms.PARTS.items():
        _need(
            algorithm[key] in known,
            f"config.algorithm.{key}={algorithm[key]!r}: use one of {sorted(known)}",
        )
    _need(
        0 <= min(algorithm.control_rate, algorithm.control_gain)
        and max(algorithm.control_rate, algorithm.control_gain) < math.inf,
        "config.algorithm.control_rate and control_gain must be finite and at least 0",
    )
    _need(
        algorithm.filter != "zero_variance" or algorithm.control != "lagrangian",
        "config.algorithm: filter=zero_variance looks at rewards, not at what control=lagrangian "
        "charges for calls: use filter=none with it",
    )
    _need(
        not config.task.budgets or algorithm.filter in ("none", "zero_variance"),
        f"config.task.budgets: filter={algorithm.filter} has the quota of one budget: use "
        "filter=none, and a control",
    )
    _need(
        algorithm.decision in algorithms.DECISIONS,
        f"config.algorithm.decision={algorithm.decision!r}: use one of {algorithms.DECISIONS}",
    )
    _need(
        not algorithms.decision_alone(config)
        or (algorithms.scores_decisions(config) and not config.optim.weight_decay),
        "config.algorithm.advantage=none leaves scored decisions alone to learn: use "
        "decision=scored with it, and config.optim.weight_decay=0, as decay would move the rest",
    )
    if not algorithms.scores_decisions(config):
        return
    scored = "config.algorithm.decision=scored"
    _need(
        algorithm.reward == "hierarchical" and algorithm.control == "none",
        f"{scored} teaches calls, at a price that holds the budget: use reward=hierarchical and "
        "control=none with it",
    )
    _need(
        algorithm.filter != "zero_variance",
        f"{scored} learns from groups of equal rewards too: use another filter with it",
    )
    _need(config.temperature > 0, f"{scored} needs samples: set config.temperature above 0")
    _need(
        bool(config.text.decision_token),
        f"{scored} needs a config.text.decision_token: it bars one token",
    )


def _check_optim(config: ConfigDict) -> None:
    _need(
        0 <= config.optim.momentum < 1,
        f"config.optim.momentum={config.optim.momentum} must lie in [0, 1)",
    )
    _need(
        0 <= config.optim.average <= 0.9999,
        f"config.optim.average={config.optim.average} must lie in [0, 0.9999]: 0 averages nothing",
    )
    _need(
        0 <= config.optim.learning_rate < math.inf,
        f"config.optim.learning_rate={config.optim.learning_rate} must be finite and at least 0",
    )


def _check_train(config: ConfigDict) -> None:
    for key in (
        "steps",
        "micro_rows",
        "logprob_chunk",
        "checkpoint_every",
        "empty_d1_limit",
    ):
        _need(
            config.train[key] >= 1,
            f"config.train.{key}={config.train[key]} must be at least 1",
        )


def _check_eval(config: ConfigDict) -> None:
    settings = config.eval
    _need(
        settings.split in ("validation", "test"),
        f"config.eval.split={settings.split!r}: use validation, or test where nothing is chosen",
    )
    _need(
        min(settings.prompts, settings.fit_prompts) >= 0,
        "config.eval.prompts and fit_prompts must be at least 0",
    )
    _need(
        settings.prompts > 0 or not settings.fit_prompts,
        "config.eval.fit_prompts needs config.eval.prompts as well",
    )
    _need(
        settings.samples >= 1 and settings.temperature > 0,
        f"config.eval.samples={settings.samples} must be at least 1, "
        f"temperature={settings.temperature} above 0",
    )
    _need(
        0 <= settings.max_unknown < 1,
        f"config.eval.max_unknown={settings.max_unknown} must lie in [0, 1): figures of the cloud "
        "need some of its verdicts",
    )


def _check_routers(config: ConfigDict) -> None:
    _need(
        min(config.routers.samples, config.routers.epochs) >= 1
        and 0 < config.routers.learning_rate < math.inf,
        "config.routers.samples and epochs must be at least 1, learning_rate finite and above 0",
    )
    _need(
        config.eval.prompts > 0 or not config.routers.record,
        "config.routers.record needs config.eval.prompts as well",
    )


def _check_number_types(config: ConfigDict) -> None:
    for name in ("model.dtype", "model.param_dtype", "decode.cache_dtype"):
        value = _setting(config, name)
        _need(
            value in ("float32", "bfloat16"),
            f"config.{name}={value!r}: use 'float32' or 'bfloat16'",
        )


def _check_batches(config: ConfigDict, devices: int) -> None:
    for name in ("prompts_per_step", "eval.batch_size", "routers.batch_size"):
        size = _setting(config, name)
        _need(
            size >= 1 and size % devices == 0,
            f"config.{name}={size} must be a positive multiple of the {devices} devices: "
            "change it, or config.cpu_devices",
        )


def _setting(config: ConfigDict, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


# ---- of the warm start


def check_warm_start(config: ConfigDict) -> None:
    """Raises UserError for settings that no warm start could use, with the fix."""
    check_config(config)
    _check_source(config.sft)
    _check_tuning(config.sft)


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
    for key in ("batch_size", "micro_rows", "checkpoint_every"):
        _need(sft[key] >= 1, f"config.sft.{key}={sft[key]} must be at least 1")
    _need(
        sft.relabel_steps >= 0,
        f"config.sft.relabel_steps={sft.relabel_steps} must be at least 0: 0 relabels nothing",
    )
    _need(0 <= sft.call_chance < 1, f"config.sft.call_chance={sft.call_chance} must lie in [0, 1)")
    _need(
        0 <= sft.learning_rate < math.inf,
        f"config.sft.learning_rate={sft.learning_rate} must be finite, at least 0",
    )
    _need(sft.check_prompts >= 0, "config.sft.check_prompts must be at least 0")
