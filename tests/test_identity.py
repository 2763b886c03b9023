"""A run keeps to its base model: another one at the same path is refused, by what differs in it."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from collab_jax import evaluate, export
from collab_jax.models import hf, identity
from collab_jax.rl import claims, experiment
from collab_jax.runtime.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled model, to change."""
    copy = tmp_path / "model"
    shutil.copytree(hf.ASSETS / "countdown-tiny", copy)
    return copy


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(1.001)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": 64,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def change_tokenizer_settings(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4096}))


def change_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text("Now: " + file.read_text())


def change_config(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 2e-6}))


CHANGES = [
    (change_weights, "weights"),
    (change_tokenizer, "tokenizer"),
    (change_tokenizer_settings, "tokenizer"),
    (change_template, "chat_template"),
    (change_config, "config"),
]


@pytest.mark.parametrize(("change", "part"), CHANGES)
def test_a_change_shows_in_its_part_alone(folder, change, part):
    before = identity.fingerprint(folder)
    assert identity.fingerprint(folder) == before
    assert sorted(before) == ["chat_template", "config", "tokenizer", "weights"]
    change(folder)
    after = identity.fingerprint(folder)
    assert {name for name in before if before[name] != after[name]} == {part}


def test_a_template_is_the_same_wherever_it_stands(folder):
    before = identity.fingerprint(folder)
    template, file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    inline = {"chat_template": template.read_text()}
    file.write_text(json.dumps(json.loads(file.read_text()) | inline))
    template.unlink()
    assert identity.fingerprint(folder) == before


def test_how_weights_are_spread_over_files_is_no_difference(folder):
    before = identity.fingerprint(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n] for n in part}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    assert identity.fingerprint(folder) == before


def test_two_weights_that_change_places_and_a_new_generation_config_are_differences(folder):
    before, file = identity.fingerprint(folder), folder / "model.safetensors"
    weights, blocks = load_file(file), ("model.layers.0", "model.layers.1")
    a, b = (f"{block}.mlp.up_proj.weight" for block in blocks)
    save_file(weights | {a: weights[b], b: weights[a]}, file)
    (folder / "generation_config.json").write_text("{}")
    after = identity.fingerprint(folder)
    assert {name for name in before if before[name] != after[name]} == {"weights", "config"}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("change", "part"), CHANGES)
def test_a_run_on_another_base_model_is_refused_by_every_command(
    small, folder, tmp_path, change, part, rank
):
    config, workdir = small(model__path=str(folder), lora__rank=rank), tmp_path / "run"
    experiment.prepare(config, workdir)
    noted = json.loads((workdir / "config.json").read_text())
    assert noted[claims.BASE] == identity.fingerprint(folder)
    experiment.prepare(config, workdir)  # the same model goes on
    assert json.loads((workdir / "config.json").read_text()) == noted
    change(folder)
    says = rf"base model in .*model has changed since the run .*: {part} \(SHA-256 \w+ then, \w+ no"
    for command in (
        lambda: experiment.prepare(config, workdir),
        lambda: evaluate.main(config, workdir),
        lambda: export.main(config, workdir, tmp_path / "out", adapter=rank > 0),
    ):
        with pytest.raises(UserError, match=says) as caught:
            command()
        assert str(caught.value).count("SHA-256") == 1


def test_a_run_begun_without_a_fingerprint_goes_on_and_gets_one(small, folder, tmp_path):
    config, workdir = small(model__path=str(folder)), tmp_path / "run"
    experiment.prepare(config, workdir)
    old = json.loads((workdir / "config.json").read_text())
    del old[claims.BASE]
    (workdir / "config.json").write_text(json.dumps(old))
    experiment.prepare(config, workdir)
    change_weights(folder)
    with pytest.raises(UserError, match="weights"):
        experiment.prepare(config, workdir)


def test_the_commit_of_a_hub_model_is_noted_and_kept_to(small, folder, tmp_path, monkeypatch):
    snapshot, asked = tmp_path / "snapshots" / COMMIT, []
    snapshot.parent.mkdir()
    folder.rename(snapshot)

    def download(name, revision, **_):
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config, workdir = small(model__path="org/name"), tmp_path / "run"
    for _ in range(2):
        experiment.prepare(config, workdir)
        noted = json.loads((workdir / "config.json").read_text())
        assert noted[claims.BASE]["commit"] == COMMIT
    assert asked == [("org/name", None), ("org/name", COMMIT)]
