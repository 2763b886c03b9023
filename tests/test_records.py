"""The table of records: three file types there and back, foreign tables as they come, each bad
input with its message.
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collab_jax import records
from collab_jax.runtime.errors import UserError

INF = np.inf
TRACES = [
    np.array([-INF, 0.5, -1.25], np.float32),
    np.array([], np.float32),
    np.array([0.1], np.float32),
]


def table(**columns):
    """Three prompts, every kind of column."""
    base = dict(
        id=["a", "b", "07"],
        local_correct=[True, False, True],
        cloud_correct=[True, True, False],
        tokens=[3, 0, 1],
        text=['said "x",\n then é', "", " "],
        logp=[-0.1, -1 / 3, -2e-9],
        score_x=[0.25, INF, -INF],
        note=["n", "m", ""],
    )
    margins = np.empty(3, object)
    margins[:] = TRACES
    return records.check(base | {"margins": margins} | columns, "here")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        if name == "margins":
            assert all(
                np.array_equal(x, y) and x.dtype == y.dtype
                for x, y in zip(a[name], b[name], strict=True)
            )
        else:
            assert a[name].tolist() == b[name].tolist(), name


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_there_and_back(tmp_path, suffix):
    path = tmp_path / f"r{suffix}"
    records.write(path, table())
    same(records.read(path), table())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_narrow_numbers_are_written_narrow_and_read_wide(tmp_path):
    path = tmp_path / "r.parquet"
    narrow = np.array([0.1, -INF, INF], np.float32)
    records.write(path, table(margins=TRACES) | {"margin": narrow})
    column = pq.ParquetFile(path).schema_arrow.field("margin")
    assert column.type == pa.float32()
    margin = records.read(path)["margin"]
    assert margin.dtype == np.float64 and (margin == narrow).all()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_written_complete_or_not_at_all(tmp_path, suffix):
    path = tmp_path / f"r{suffix}"
    records.write(path, table())
    before = path.read_bytes()
    with pytest.raises(ValueError):  # columns of unequal length, seen while writing
        records.write(path, table() | {"tokens": np.arange(2)})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_docstring_holds_every_column_with_its_type():
    rows = re.findall(r"^    ([a-z_<>]+) {2,}(f32 list|[a-z0-9]+) ", records.__doc__, re.M)
    documented = {name: kind for name, kind in rows if name != "column"}
    assert {n: k for n, k in documented.items() if "<" not in n} == records.TYPES
    for name in ("score_<router>", "tokens_<router>"):
        assert documented[name] == records.type_of(name.replace("<router>", "x"))
    assert set(records.DEFAULTS) == set(
        re.findall(r"^    (\w+) .*; default ", records.__doc__, re.M)
    )


FOREIGN_CSV = "\ufeffid,local_correct,cloud_correct,score_mine\n1,TRUE,1,0.5\n007,False,0,-2\n\n"
FOREIGN_JSONL = """\
{"id": 1, "local_correct": true, "cloud_correct": 1, "score_mine": 0.5}

{"id": "007", "local_correct": false, "cloud_correct": 0, "score_mine": -2}
"""


@pytest.mark.parametrize("name, text", [("x.csv", FOREIGN_CSV), ("x.jsonl", FOREIGN_JSONL)])
def test_a_foreign_table_of_three_columns_and_a_score_just_works(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    r = records.read(tmp_path / name)
    assert r["id"].tolist() == ["1", "007"]
    assert r["local_correct"].tolist() == r["cloud_correct"].tolist() == [True, False]
    assert records.scores(r)["mine"].tolist() == [0.5, -2.0]
    assert {c: r[c].tolist() for c in records.DEFAULTS} == {
        c: [v, v] for c, v in records.DEFAULTS.items()
    }
    assert r["ended"].dtype == bool


def test_a_foreign_parquet_with_integer_verdicts_nulls_and_lists(tmp_path):
    rows = {
        "id": [1, 2],
        "local_correct": [0, 1],
        "cloud_correct": [1.0, 0.0],
        "text": ["x", None],
        "margins": [[1.0, None], None],
        "score_r": [1, 2],
    }
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    r = records.read(tmp_path / "x.parquet")
    assert r["local_correct"].tolist() == [False, True] and r["cloud_correct"].tolist() == [
        True,
        False,
    ]
    assert r["text"].tolist() == ["x", ""] and r["score_r"].dtype == float
    assert [m.tolist() for m in r["margins"]] == [[1.0, -INF], []]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"id": ["a", "b", "a"]},
            r"here: 1 of 3 rows repeat an id \(rows 1 and 3: 'a'\); keep one row a prompt",
        ),
        ({"id": ["a", None, "c"]}, r"here: id is empty in 1 of 3 rows \(row 2"),
        (
            {"local_correct": ["yes", True, "0"]},
            r"here: local_correct is not true or false.* in 1 of 3 rows \(row 1, id 'a': 'yes'\)",
        ),
        (
            {"cloud_correct": [1, None, 2]},
            r"cloud_correct is not true or false.* in 2 of 3 rows \(row 2, id 'b': 'None'\)",
        ),
        (
            {"score_x": [0.0, np.nan, 1.0]},
            r"score_x is not a number in 1 of 3 rows \(row 2, id 'b': 'nan'\).*or the column",
        ),
        (
            {"score_y": ["1", "high", ""]},
            r"score_y is not a number in 2 of 3 rows \(row 2, id 'b': 'high'\)",
        ),
        ({"score_y": [[1], [2], [3]]}, "score_y is not a number in 3 of 3 rows"),
        ({"tokens": [1.5, 2, -1]}, r"tokens is not a whole number from 0 in 2 of 3 rows \(row 1"),
        (
            {"margins": [[0.5], "[1, 2", [[1]]]},
            r"margins is not a list of numbers in 2 of 3 rows \(row 2",
        ),
        ({"tokens": [1, 2]}, "here has columns of unequal length: id 3, tokens 2"),
    ],
)
def test_bad_rows_are_refused_with_file_row_and_reason(change, message):
    with pytest.raises(UserError, match=message):
        table(**change)


def test_missing_columns_and_empty_tables_are_refused():
    with pytest.raises(
        UserError, match=r"x.csv has no column id and no cloud_correct \(it has local_correct, ID\)"
    ):
        records.check({"local_correct": [True], "ID": ["a"]}, "x.csv")
    with pytest.raises(UserError, match="x.csv holds no rows"):
        records.check({name: [] for name in records.REQUIRED}, "x.csv")
    with pytest.raises(UserError, match="device tokens: the records have no column margins"):
        records.require({"tokens": np.zeros(1)}, ["tokens", "margins"], "device tokens")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "x.txt",
            b"",
            r"x.txt is not a table of records: the name must end in .parquet, .jsonl, .csv",
        ),
        ("x.parquet", b"PAR1 cut off", r"cannot read .*x.parquet \(.*is it there, and complete"),
        ("x.jsonl", b'{"id": 1}\n{"id": ', r"x.jsonl: line 2 is not JSON"),
        ("x.jsonl", b"[1]\n", r"x.jsonl: line 1 is not a JSON object"),
        ("x.jsonl", b"", r"x.jsonl has no column id"),
        ("x.csv", b"", r"x.csv has no column id"),
        ("x.csv", b"id,local_correct,cloud_correct\n", "x.csv holds no rows"),
        (
            "x.csv",
            b"id,local_correct,cloud_correct\na,1\n",
            "x.csv: row 1 has 2 cells, the header has 3",
        ),
        ("x.csv", b"id,id,cloud_correct\na,1,1\n", "the header has id twice"),
        ("x.csv", b"id\n\xff\n", r"cannot read .*x.csv \(.*decode"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        records.read(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    for suffix in (".parquet", ".jsonl", ".csv"):
        with pytest.raises(UserError, match=r"cannot read .*none.*is it there"):
            records.read(tmp_path / f"none{suffix}")


def test_a_trace_longer_than_a_csv_cell_usually_may_be(tmp_path):
    long = np.arange(40_000, dtype=np.float32) / 7
    records.write(tmp_path / "x.csv", table(margins=[long, long, long]))
    assert np.array_equal(records.read(tmp_path / "x.csv")["margins"][1], long)


def test_align_reorders():
    a, b = table(), {name: column[[2, 0, 1]] for name, column in table().items()}
    same(records.align(a, b), a)


def test_a_table_that_says_nothing_of_strata_goes_with_one_that_does():
    a, b = table(stratum=["x", "y", "z"]), table(stratum=[""] * 3)
    same(records.align(a, b), b)
    with pytest.raises(UserError, match="3 ids with another stratum"):
        records.align(a, table(stratum=["y", "z", "x"]))


def test_align_refuses_other_prompts():
    message = (
        r"A and B are of other prompts: 2 ids in both, 1 only in A \(as '07'\), "
        r"1 only in B \(as 'z'\)"
    )
    with pytest.raises(UserError, match=message):
        records.align(table(), table(id=["a", "z", "b"]), "A", "B")
    part = {name: column[:2] for name, column in table().items()}
    with pytest.raises(
        UserError, match=r"2 ids in both, 1 only in the first table \(as '07'\); evaluate both"
    ):
        records.align(table(), part)
    with pytest.raises(UserError, match=r"have 1 ids with another prompt \(as 'b'\)"):
        records.align(table(prompt=["p", "q", "r"]), table(prompt=["p", "Q", "r"]))
