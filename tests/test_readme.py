"""Every command of the README runs, in the README's order, with small settings and its workdirs
moved to a scratch folder.
"""

import json
import re
import shlex
import subprocess
import sys

from conftest import ROOT, SMALL

from collab_jax.bench import peers
from collab_jax.reports import sweep as sweep_report
from collab_jax.rl import sweeps

README = (ROOT / "README.md").read_text()


def commands():
    """The commands of the README's bash blocks, continued lines joined, loops reduced to their
    first round.
    """
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"\s#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def test_the_two_commands_come_first():
    assert commands()[:2] == ["./launch/quickstart.sh", "./launch/test.sh"]
    for script in commands()[:2]:
        assert (
            ROOT / script
        ).stat().st_mode & 0o111  # test_launch.py runs them, with stand-ins for pip and python


def test_every_other_command_runs(tmp_path, data_dir):
    small = (
        " ".join(f"--config.{key}={value}" for key, value in SMALL.items())
        + f" --config.task.data_dir={data_dir}"
    )
    ran = []
    for line in commands()[2:]:
        loop = re.fullmatch(r"for (\w+) in (\S+).*; do (.*); done", line)
        if loop:
            line = loop[3].replace(f"${loop[1]}", loop[2])
        assert line.startswith("python -m collab_jax."), (
            f"a README command that no test runs: {line}"
        )
        words = shlex.split(line.replace("runs/", f"{tmp_path}/"))[1:]
        if "collab_jax.bench" in words:
            if "peers" in words and set(peers.PACKAGES) - set(peers.versions()):
                continue
            extra = (
                small.split()
                if "rehearse" in words
                else ["--repeats", "1", "--prompts", "2", "--group", "2"]
            )
            extra += ["--max_new", "8"] if {"decode", "update"} & set(words) else []
        elif (
            "collab_jax.sweep" in words
        ):  # hours of work: test_sweep.py runs sweeps, this one's runs are checked
            assert sweeps.jobs(sweeps.load(ROOT / words[words.index("--config") + 1]), tmp_path)
            continue
        elif {"collab_jax.compare", "collab_jax.calibrate"} & set(words):
            extra = []
        else:
            extra = small.split()
        done = subprocess.run(
            [sys.executable, *words, *extra], cwd=ROOT, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        ran.append(words[1])
    modules = ("train", "sft", "evaluate", "export", "bench", "compare", "calibrate")
    assert {f"collab_jax.{module}" for module in modules} <= set(ran)


def test_the_headline_is_that_of_the_published_results():
    result = json.loads((ROOT / "launch" / "results" / "paper_table" / "compare.json").read_text())
    assert sweep_report.headline_table(result) in README


def test_files_and_keys_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    common = (ROOT / "configs" / "common.py").read_text()
    for key in re.findall(r"--config\.([\w.]+)=", README):
        assert f"config.{key} =" in common, key


def test_the_glossary_names_every_metric():
    metrics = re.findall(
        r'"(\w+)": ',
        (ROOT / "collab_jax/rl/step.py").read_text().split("return {")[1].split("}\n")[0],
    )
    assert len(metrics) > 15
    for name in metrics:
        assert f"`{name}`" in README, name
