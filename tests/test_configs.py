"""Every file in configs/: it loads, is complete, and says how it is run."""

import pathlib
import runpy

import pytest
from conftest import ROOT

from collab_jax.rl import experiment, settings
from collab_jax.runtime.errors import UserError
from collab_jax.tasks import make_task

FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_config_has_the_common_keys_and_no_others(file: pathlib.Path):
    common = runpy.run_path(str(ROOT / "configs" / "common.py"))["get_config"]()
    config = runpy.run_path(str(file))["get_config"]()
    keys = lambda c: set(c.to_dict() if not hasattr(c, "keys") else c.keys())  # noqa: E731
    assert keys(config) == keys(common)
    for section in (
        "model",
        "lora",
        "text",
        "task",
        "cloud",
        "reward",
        "algorithm",
        "optim",
        "train",
        "eval",
        "sft",
    ):
        assert keys(config[section]) == keys(common[section])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_settings_are_possible(file: pathlib.Path):
    config = runpy.run_path(str(file))["get_config"]()
    experiment.check_config(config)
    config.task.unsafe_code = True  # nothing runs: a machine without a sandbox can look, too
    make_task(config)
    if config.sft.steps:
        settings.check_warm_start(config)


@pytest.mark.parametrize(
    "setting", [{"micro_rows": 0}, {"learning_rate": -1.0}, {"learning_rate": float("nan")}]
)
def test_impossible_warm_starts_are_refused_by_name(small, setting):
    config = small("countdown_tiny_sft.py")
    config.sft.update(setting)
    with pytest.raises(UserError, match=next(iter(setting))):
        settings.check_warm_start(config)


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "common"], ids=lambda f: f.stem)
def test_config_is_a_lab_note_with_its_command(file: pathlib.Path):
    note = runpy.run_path(str(file))["__doc__"]
    assert f"--config configs/{file.name}" in note


def test_common_has_each_key_once_with_a_comment():
    lines = (ROOT / "configs" / "common.py").read_text().splitlines()
    settings = [
        (line, above)
        for above, line in zip(lines, lines[1:], strict=False)
        if line.startswith("    config.") and "ConfigDict()" not in line
    ]
    names = [line.split(" = ")[0] for line, _ in settings]
    assert len(names) > 100 and len(set(names)) == len(names)
    assert not [
        line for line, above in settings if "  # " not in line and not above.startswith("    # ")
    ]
