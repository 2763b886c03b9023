"""The benchmarks as TFDS data sets, downloaded from their public sources once.

They are built without TensorFlow, and used where `config.task.data_dir` has no NAME.jsonl(.gz)
(`rows.py`): the data set is then built below that folder on first use, from GitHub, at the commits
named here. GSM8K is TFDS's own; the others are configs of `Benchmark`. Rows have the same fields as
in JSON lines. MATH's training split leaves out the nine rows, of 7,500, that cannot be trained on
honestly.
"""

import contextlib
import csv
import io
import json
import pathlib
import re
import sys
import zipfile
from collections.abc import Iterator

import tensorflow_datasets as tfds

from collab_jax.tasks import code_source, svamp_source
from collab_jax.tasks.base import TaskError

RAW, ARCHIVE = "https://raw.githubusercontent.com", "https://codeload.github.com"
_QWEN = "QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data"
_MBPP = "google-research/google-research"
SOURCES = {  # config -> where its file is, below RAW or (a whole repository, as zip) ARCHIVE
    # the 12,500 files of the MATH release
    "math": "aiwaves-cn/agents/zip/e8c4e3c2d19739d3dff59e577d1c97090cc15f59",
    "math500": (
        "ZubinGou/math-evaluation-harness/db77bc6bb2a17c90ed2d63e88ebd8c40a82858c5"
        "/data/math_oai/test.jsonl"
    ),
    "amc23": f"{_QWEN}/amc23/test.jsonl",
    "aime24": f"{_QWEN}/aime24/test.jsonl",
    "minerva_math": f"{_QWEN}/minerva_math/test.jsonl",
    "agieval_math": (
        "ruixiangcui/AGIEval/5c77d073fda993f1652eaae3cf5d04cc5fd21d40/data/v1/math.jsonl"
    ),
    # CSV files of 57 subjects
    "mmlu": "HaeChan0305/MLILAB-FedLLM/zip/d92730e8bacd7b3a61e551e015e40588e10234b4",
    "svamp": "arkilpatel/SVAMP/zip/689d7ccac74b9983a2ac7cc3b264f441b99e7c53",
    "mbpp": f"{_MBPP}/2251e8c67a7fe7d6348714967ee101080b28e956/mbpp/mbpp.jsonl",
    "mbpp_sanitized": f"{_MBPP}/dec705a28fea05552916c0b83c52f5f23609e8ee/mbpp/sanitized-mbpp.json",
    "humaneval": (
        "openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
    ),
}
SPLITS = {  # name of a file of JSON lines -> (data set, split)
    **{
        f"{name}_{split}": (name, split)
        for name in ("math", "gsm8k", "svamp")
        for split in ("train", "test")
    },
    **{
        name: (name, "test")
        for name in ("math500", "amc23", "aime24", "minerva_math", "agieval_math")
    },
    "mmlu_test": ("mmlu", "test"),
    "mbpp": ("mbpp", "problems"),
    "mbpp_sanitized_test": ("mbpp_sanitized", "test"),
    "humaneval": ("humaneval", "test"),
}
# Of MATH's training split: the same problem as a test row, and (the last two) an empty answer.
NOT_TRAINED = (
    "algebra/517", "algebra/2197", "algebra/2733", "geometry/490", "geometry/6032",
    "geometry/25086", "prealgebra/43", "number_theory/7115", "number_theory/7117",
)  # fmt: skip
BOX_IS_NO_ANSWER = {"prealgebra/177": "6"}  # of MATH's test split: there \boxed is an operation
# Rows of MMLU's high-school mathematics that are problems of MATH's training split.
IN_MATH_TRAIN = frozenset((
    3, 12, 13, 20, 22, 26, 28, 31, 33, 34, 35, 39, 43, 45, 46, 49, 51, 53, 56, 59, 63, 68, 74, 75,
    83, 91, 101, 103, 104, 105, 115, 116, 117, 119, 121, 122, 131, 132, 136, 141, 142, 146, 150,
    156, 159, 160, 165, 170, 171, 178, 186, 190, 191, 194, 195, 198, 202, 203, 206, 208, 218, 223,
    228, 229, 230, 232, 238, 240, 251, 257, 259, 261, 265, 268,
))  # fmt: skip


# ---- one source each: path of the download -> rows


def boxes(solution: str) -> list[str]:
    r"""The contents of every \boxed{...} and \fbox{...}, and of \boxed without braces."""
    contents = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*", solution):
        after = solution[match.end() :]
        if not after.startswith("{"):
            contents.append(re.split(r"[\s$]", after, maxsplit=1)[0])
            continue
        depth = 0
        for end, c in enumerate(after):
            depth += {"{": 1, "}": -1}.get(c, 0) if after[end - 1 : end] != "\\" else 0
            if depth == 0:
                contents.append(after[1:end].strip())
                break
    return contents


def _math(path: pathlib.Path, split: str) -> Iterator[dict]:
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if f"/datasets/data/math/{split}/" in n]
        files = [pathlib.PurePosixPath(n) for n in names if not n.endswith("/")]
        for file in sorted(files, key=lambda f: (f.parent.name, int(f.stem.split(".")[0]))):
            key = f"{file.parent.name}/{file.name.removesuffix('.json')}"
            if split == "train" and key in NOT_TRAINED:
                continue
            row = json.loads(archive.read(str(file)))
            answers = boxes(row["solution"])
            answer = answers[-1]
            if split == "test":
                answer = BOX_IS_NO_ANSWER.get(key, answer)
            level = row["level"].removeprefix("Level ")
            several = {"boxed_all": list(dict.fromkeys(answers))} if len(set(answers)) > 1 else {}
            yield {
                "id": f"math_{split}/{key}",
                "problem": row["problem"],
                "answer": answer,
                "solution": row["solution"],
                "level": int(level) if level.isdigit() else None,
                "type": row["type"],
                **several,
            }


def _lines(path: pathlib.Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _math500(path: pathlib.Path, split: str) -> Iterator[dict]:
    for row in _lines(path):
        key = row["unique_id"].removeprefix("test/").removesuffix(".json")
        kept = {name: row[name] for name in ("problem", "answer", "solution", "level")}
        yield {
            "id": f"math500/{key}",
            **kept,
            "type": row["subject"],
            "math_test_id": f"math_test/{key}",
        }


def _contest(url: str) -> tuple[str, str, str]:
    """('2024', 'I', '10'): year, contest and number from the address of a contest's problem."""
    *_, contest, problem = url.split("/")
    year, _, kind, *_ = contest.split("_")
    return year, kind, problem.removeprefix("Problem_")


def _amc23(path: pathlib.Path, split: str) -> Iterator[dict]:
    for row in _lines(path):
        answer = row["answer"]
        whole = str(int(answer)) if float(answer).is_integer() else str(answer)
        key = "-".join(_contest(row["url"]))
        yield {"id": f"amc23/{key}", "problem": row["problem"], "answer": whole, "url": row["url"]}


def _aime24(path: pathlib.Path, split: str) -> Iterator[dict]:
    for row in _lines(path):
        answer = str(int(row["answer"]))  # without leading zeros
        key = "-".join(_contest(row["url"])[1:])
        yield {
            "id": f"aime24/{key}",
            "problem": row["problem"],
            "answer": answer,
            "url": row["url"],
        }


def _minerva_math(path: pathlib.Path, split: str) -> Iterator[dict]:
    for row in _lines(path):
        kept = {name: row[name] for name in ("problem", "solution", "type")}
        yield {"id": f"minerva_math/{row['idx']}", **kept, "answer": boxes(row["solution"])[-1]}


def _agieval_math(path: pathlib.Path, split: str) -> Iterator[dict]:
    for i, row in enumerate(_lines(path)):
        kept = {name: row["other"][name] for name in ("solution", "level", "type")}
        yield {
            "id": f"agieval_math/{i}",
            "problem": row["question"],
            "answer": row["answer"].strip(),
            **kept,
        }


def _mmlu(path: pathlib.Path, split: str) -> Iterator[dict]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(
            n for n in archive.namelist() if "/data/mmlu/test/" in n and n.endswith("_test.csv")
        ):
            subject = name.rsplit("/", 1)[1].removesuffix("_test.csv")
            with io.TextIOWrapper(archive.open(name), encoding="utf-8", newline="") as file:
                for i, row in enumerate(csv.DictReader(file)):
                    seen = subject == "high_school_mathematics" and i in IN_MATH_TRAIN
                    yield {
                        "id": f"mmlu/{subject}/{i}",
                        "problem": row["question"],
                        "choices": [row[f"choice{k}"] for k in range(4)],
                        "answer": "ABCD"[int(row["answer"])],
                        "type": subject,
                        **({"math_train_id": True} if seen else {}),
                    }


READERS = {
    "math": _math,
    "math500": _math500,
    "amc23": _amc23,
    "aime24": _aime24,
    "minerva_math": _minerva_math,
    "agieval_math": _agieval_math,
    "mmlu": _mmlu,
    "svamp": svamp_source.read,
    "mbpp": code_source.mbpp,
    "mbpp_sanitized": code_source.mbpp_sanitized,
    "humaneval": code_source.humaneval,
}


# ---- TFDS


class Benchmark(tfds.core.GeneratorBasedBuilder):
    """Questions and answers in the order of their source; `fields` has the rest as JSON."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, description=source) for name, source in SOURCES.items()
    ]
    builder_config: tfds.core.BuilderConfig

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("id", "problem", "answer", "fields")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        name = self.builder_config.name
        source = SOURCES[name]
        url = f"{ARCHIVE if '/zip/' in source else RAW}/{source}"
        path = pathlib.Path(dl_manager.download(url))
        splits = [split for data_set, split in SPLITS.values() if data_set == name]
        return {split: self._generate_examples(path, split) for split in splits}

    def _generate_examples(self, path: pathlib.Path, split: str) -> Iterator[tuple[int, dict]]:
        for i, row in enumerate(READERS[self.builder_config.name](path, split)):
            plain = {name: row.pop(name) for name in ("id", "problem", "answer")}
            yield i, {**plain, "fields": json.dumps(row)}


def _builder(name: str, folder: pathlib.Path) -> tfds.core.DatasetBuilder:
    if name == "gsm8k":
        return tfds.builder("gsm8k", data_dir=folder, file_format="array_record")
    return Benchmark(config=name, data_dir=folder, file_format="array_record")


def read(folder: pathlib.Path, name: str) -> list[dict]:
    """The rows of a key of SPLITS, from the data set below `folder`.

    The data set is downloaded and built where it is not there. Raises TaskError where that fails.
    """
    data_set, split = SPLITS[name]
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = _builder(data_set, folder)
            if not builder.is_prepared():
                print(
                    f"building the data set {data_set} below {folder} from its source",
                    file=sys.stderr,
                )
            builder.download_and_prepare()
        # A decorator of TFDS hides the signature.
        records = list(builder.as_data_source(split))  # pyright: ignore[reportCallIssue]
    except Exception as error:  # no network, a moved source, a full disk, damaged files: many kinds
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise TaskError(
            f"no {name}.jsonl or {name}.jsonl.gz in {folder}, and the data set {data_set} cannot "
            f"be built there ({cause}): set config.task.data_dir to a folder that has one of them, "
            "or connect this machine to the internet once"
        ) from error
    rows = [{key: value.decode() for key, value in record.items()} for record in records]
    if data_set == "gsm8k":
        return [
            {
                "id": f"gsm8k/tfds-{split}-{i}",
                "problem": row["question"],
                "answer": row["short_answer"].strip().replace(",", ""),
                "solution": row["answer"],
            }
            for i, row in enumerate(rows)
        ]
    return [
        {key: row[key] for key in ("id", "problem", "answer")} | json.loads(row["fields"])
        for row in rows
    ]
