"""Benchmarks as TFDS data sets: made-up sources over HTTP, read into rows, kept on disk."""

import functools
import gzip
import http.server
import json
import re
import threading
import zipfile

import pytest

from collab_jax.runtime.errors import UserError
from collab_jax.tasks import benchmarks, rows

AOPS = "https://artofproblemsolving.com/wiki/index.php"
LINES = {
    "math500": {
        "problem": "p",
        "solution": "s",
        "answer": "5",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "test/algebra/7.json",
    },
    "amc23": {
        "id": 0,
        "problem": "p",
        "answer": 27.0,
        "url": f"{AOPS}/2023_AMC_12A_Problems/Problem_1",
    },
    "aime24": {
        "id": 60,
        "problem": "p",
        "answer": "025",
        "url": f"{AOPS}/2024_AIME_II_Problems/Problem_10",
    },
    "minerva_math": {
        "problem": "p",
        "solution": r"So \boxed{1.6} \mathrm{~cm}",
        "type": "Stars",
        "idx": 4,
    },
    "agieval_math": {
        "question": "p",
        "answer": " 3 ",
        "other": {"solution": "s", "level": 5, "type": "Algebra"},
    },
}
ROWS = {
    "math500": {
        "id": "math500/algebra/7",
        "answer": "5",
        "type": "Algebra",
        "level": 2,
        "math_test_id": "math_test/algebra/7",
    },
    "amc23": {"id": "amc23/2023-12A-1", "answer": "27"},
    "aime24": {"id": "aime24/II-10", "answer": "25"},
    "minerva_math": {"id": "minerva_math/4", "answer": "1.6", "type": "Stars"},
    "agieval_math": {"id": "agieval_math/0", "answer": "3", "level": 5},
}


def math_row(solution, level="Level 3"):
    return json.dumps({"problem": "p", "level": level, "type": "Algebra", "solution": solution})


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The public sources, made up and served on this machine."""
    www = tmp_path / "www"

    def place(name):
        file = www / benchmarks.SOURCES[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    for name, line in LINES.items():
        place(name).write_text(json.dumps(line) + "\n")
    with zipfile.ZipFile(place("math"), "w") as archive:
        folder = "agents-e8c4/src/agents/datasets/data/math"
        archive.writestr("agents-e8c4/README.md", "")
        archive.writestr(
            f"{folder}/train/algebra/10.json", math_row(r"\boxed{ 1 } or \fbox{\{2\}}", "Level ?")
        )
        archive.writestr(f"{folder}/train/algebra/9.json", math_row(r"It is \boxed 7$."))
        also_a_test_row = "algebra/517"
        archive.writestr(f"{folder}/train/{also_a_test_row}.json", math_row(r"\boxed{11}"))
        archive.writestr(f"{folder}/test/prealgebra/177.json", math_row(r"\boxed{12}"))
    with zipfile.ZipFile(place("mmlu"), "w") as archive:
        table = "question,choice0,choice1,choice2,choice3,answer\n" + '"a, b?",1,2,3,4,3\n' * 4
        archive.writestr("FedLLM-d927/data/mmlu/test/high_school_mathematics_test.csv", table)
        archive.writestr("FedLLM-d927/data/mmlu/test/anatomy_test.csv", table)
    with zipfile.ZipFile(place("svamp"), "w") as archive:
        line = "Ann has number0 pens and number1 caps .,4.0 5.0,+ number0 number1,9.0\n"
        header = "Question,Numbers,Equation,Answer\n"
        archive.writestr("SVAMP-689d/data/mawps-asdiv-a_svamp/train.csv", header + line)
        problem = {"ID": "chal-1", "Body": "Bo has 6.", "Question": "Half?", "Answer": 3.0}
        challenge = problem | {"Equation": "( 6.0 / 2.0 )", "Type": "Common-Division"}
        archive.writestr("SVAMP-689d/SVAMP.json", json.dumps([challenge]))
    mbpp = {"task_id": 12, "text": "p", "code": "x\r\ny", "test_list": ["t"]}
    mbpp |= {"test_setup_code": "", "challenge_test_list": []}
    place("mbpp").write_text(json.dumps(mbpp) + "\n")
    sanitized = {"prompt": "p", "code": "c", "test_imports": ["import math"], "test_list": ["t"]}
    several = [sanitized | {"task_id": number} for number in (3, 11, 510, 511)]
    place("mbpp_sanitized").write_text(json.dumps(several))
    human_eval = {"task_id": "HumanEval/7", "prompt": "def f():", "canonical_solution": " pass"}
    with gzip.open(place("humaneval"), "wt") as file:
        file.write(json.dumps(human_eval | {"test": "t", "entry_point": "f"}) + "\n")
    (www / "gsm8k").mkdir()
    for split in ("train", "test"):
        (www / "gsm8k" / f"{split}.jsonl").write_text(
            json.dumps({"question": split, "answer": "so\n#### 1,200"}) + "\n"
        )

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(www))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(benchmarks, "RAW", base)
    monkeypatch.setattr(benchmarks, "ARCHIVE", base)
    from tensorflow_datasets.text.gsm8k import gsm8k

    monkeypatch.setattr(
        gsm8k, "_URLS", {split: f"{base}/gsm8k/{split}.jsonl" for split in ("train", "test")}
    )
    yield server
    server.shutdown()
    server.server_close()


def test_every_source_becomes_rows_once_and_for_all(sources, tmp_path):
    folder = tmp_path / "data"
    read = lambda name: rows.read(folder, name)  # noqa: E731
    for name, expected in ROWS.items():
        (row,) = read(name)
        assert row["problem"] == "p" and {key: row[key] for key in expected} == expected
    nine, ten = read("math_train")
    assert (nine["id"], nine["answer"], nine["level"]) == ("math_train/algebra/9", "7", 3)
    assert (ten["id"], ten["answer"], ten["level"]) == ("math_train/algebra/10", r"\{2\}", None)
    assert "boxed_all" not in nine and ten["boxed_all"] == ["1", r"\{2\}"]
    assert [row["answer"] for row in read("math_test")] == ["6"]
    mmlu = rows.read(folder, "mmlu_test", ("answer", "choices"))
    assert [row["id"] for row in mmlu][3:5] == ["mmlu/anatomy/3", "mmlu/high_school_mathematics/0"]
    assert (mmlu[0]["problem"], mmlu[0]["answer"]) == ("a, b?", "D")
    assert mmlu[0]["choices"] == ["1", "2", "3", "4"]
    assert [row["id"] for row in mmlu if row.get("math_train_id")] == [
        "mmlu/high_school_mathematics/3"
    ]
    [pens], [half] = read("svamp_train"), read("svamp_test")
    assert (pens["problem"], pens["answer"]) == ("Ann has 4 pens and 5 caps.", "9")
    assert (pens["id"], pens["solution"], pens["level"]) == ("mawps-asdiv/0", "4+5=9", 1)
    assert (half["id"], half["problem"], half["answer"]) == ("chal-1", "Bo has 6. Half?", "3")
    [mbpp], [human_eval] = read("mbpp"), read("humaneval")
    assert (mbpp["id"], mbpp["answer"], mbpp["test_list"]) == ("mbpp/12", "x\ny", ["t"])
    assert (human_eval["id"], human_eval["answer"]) == ("HumanEval/7", " pass")
    assert (human_eval["test"], human_eval["entry_point"]) == ("t", "f")
    sanitized = read("mbpp_sanitized_test")
    assert [row["id"] for row in sanitized] == ["mbpp_sanitized/11", "mbpp_sanitized/510"]
    [word_problem] = read("gsm8k_test")
    assert word_problem == {
        "id": "gsm8k/tfds-test-0",
        "problem": "test",
        "answer": "1200",
        "solution": "so\n#### 1,200",
    }
    sources.shutdown()
    assert read("math_train") == [nine, ten]  # no second download

    (folder / "math_train.jsonl").write_text(
        json.dumps({"id": "mine", "problem": "p", "answer": "1"}) + "\n"
    )
    assert [row["id"] for row in read("math_train")] == ["mine"]  # a file wins


def test_a_source_that_cannot_be_had_names_the_fix(sources, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.SOURCES, "amc23", "moved/away.jsonl")
    says = r"no amc23.jsonl or amc23.jsonl.gz in .*data set amc23 cannot be built.*task.data_dir"
    with pytest.raises(UserError, match=says):
        rows.read(tmp_path / "data", "amc23")


def test_the_sources_are_pinned_and_every_data_set_has_a_reader():
    data_sets = {name for name, _ in benchmarks.SPLITS.values()}
    assert set(benchmarks.READERS) == set(benchmarks.SOURCES) == data_sets - {"gsm8k"}
    for source in benchmarks.SOURCES.values():
        assert re.search(r"/[0-9a-f]{40}(/|$)", source)  # a commit
