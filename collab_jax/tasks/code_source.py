"""MBPP's and HumanEval's rows, made of the files of their authors' repositories."""

import gzip
import json
import pathlib
from collections.abc import Iterator

SANITIZED_TEST = range(11, 511)  # the numbers of MBPP's test


def mbpp(path: pathlib.Path, split: str) -> Iterator[dict]:
    """The rows of mbpp.jsonl."""
    with open(path, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            kept = {name: row[name] for name in ("test_list", "challenge_test_list")}
            yield {
                "id": f"mbpp/{row['task_id']}",
                "problem": row["text"],
                "answer": row["code"].replace("\r\n", "\n"),
                "test_setup_code": row["test_setup_code"],
                **kept,
            }


def mbpp_sanitized(path: pathlib.Path, split: str) -> Iterator[dict]:
    """The rows of sanitized-mbpp.json that belong to MBPP's test."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        if row["task_id"] in SANITIZED_TEST:
            yield {
                "id": f"mbpp_sanitized/{row['task_id']}",
                "problem": row["prompt"],
                "answer": row["code"],
                "test_imports": row["test_imports"],
                "test_list": row["test_list"],
            }


def humaneval(path: pathlib.Path, split: str) -> Iterator[dict]:
    """The rows of HumanEval.jsonl.gz."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            kept = {name: row[name] for name in ("test", "entry_point")}
            yield {
                "id": row["task_id"],
                "problem": row["prompt"],
                "answer": row["canonical_solution"],
                **kept,
            }
