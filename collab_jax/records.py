"""Records: what the device and the cloud answered, one row a prompt, from any evaluation.

    column             type      unit    meaning
    -----------------  --------  ------  --------------------------------------------------------
    id                 str               required: the prompt's name, once in a table
    local_correct      bool              required: the device is right with the marker disallowed
    cloud_correct      bool              required: the cloud is right; False where not known
    local_grade        float             how right the device is, 0 to 1, where a task grades
    cloud_grade        float             how right the cloud is, 0 to 1; 0 where not known
    task               str               name of the task; default ""
    split              str               train, validation or test; default ""
    stratum            str               difficulty class; each also has its own AUC; default ""
    shown_budget       float             the share of calls that the prompt shows, if it does
    prompt             str               what was asked
    text               str               the device's response
    ended              bool              the response was not cut off; default True
    formatted          bool              it is well formed; default True
    lenient_correct    bool              the answer is right, tags or not
    lenient_grade      float             how right it is, 0 to 1, tags or not
    unjudged           bool              the verifier could not judge it: it counts as wrong
    cloud_known        bool              the call succeeded, its answer was judged; default True
    tokens             int       tokens  of the device's response, EOS in
    ms                 float     ms      the device took for it
    cloud_tokens       int       tokens  of the cloud's call, input + output
    cloud_usd          float     USD     price of the cloud's call
    shared_correct     bool              the cloud is right when it sees the natural pass's attempt
    shared_known       bool              that call and the one without the attempt succeeded
    shared_extra_tokens  int     tokens  of that call's input, more than without
    redacted           bool              redaction changed what the cloud was asked
    plain_correct      bool              the cloud is right when it is asked without redaction
    plain_known        bool              that answer was in the store, and was judged
    logp               float     nats    summed log-probability of the response
    answer_logp        float     nats    that of the tokens after `<answer>` opened
    margin             float     logits  max_t m_t, the trained decision (`sampler.py`)
    first_margin       float     logits  m_t at the first decision state, before any attempt
    last_margin        float     logits  m_t at the last one, where the answer opens (or ends, see
                                         config.text.decide_after_answer)
    margins            f32 list  logits  the trace m_t, one a token, -inf off decision states
    natural_text       str               of the pass with the marker allowed: the response
    natural_called     bool              the decision token came at a decision state; in a drawn
                                         response with a marker of several tokens, all of it
    natural_completed  bool              and free decoding finished the marker
    natural_correct    bool              the answer is right
    natural_grade      float             how right it is, 0 to 1
    natural_ended      bool              the response was not cut off
    natural_tokens     int       tokens  up to the decision token where it called, else all
    score_<router>     float             higher means "send it to the cloud"; may be infinite
    tokens_<router>    float     tokens  device tokens that the router itself spent

Columns without a default may be absent; what needs them says so. A router that is more than
arithmetic on these columns (agreement of samples, self-verification, learned on text or hidden
state) comes as its `score_` column. Any other column is kept as it was read.

Files: parquet, JSONL, CSV (`runtime/tables.py`). In the latter two a trace is a JSON list, with
null for -inf, and an infinite score is `Infinity` or `inf`; in CSV a bool is true/false
or 1/0. With the three required columns and one score any table can be compared.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from collab_jax.runtime import tables
from collab_jax.runtime.errors import UserError
from collab_jax.runtime.tables import Column

Records = dict[str, np.ndarray]  # a column each, [n]; str and lists as objects

REQUIRED = ("id", "local_correct", "cloud_correct")
DEFAULTS = {
    "task": "",
    "split": "",
    "stratum": "",
    "ended": True,
    "formatted": True,
    "cloud_known": True,
}
TYPES = {
    "id": "str",
    "local_correct": "bool",
    "cloud_correct": "bool",
    "local_grade": "float",
    "cloud_grade": "float",
    "task": "str",
    "split": "str",
    "stratum": "str",
    "shown_budget": "float",
    "prompt": "str",
    "text": "str",
    "ended": "bool",
    "formatted": "bool",
    "lenient_correct": "bool",
    "lenient_grade": "float",
    "unjudged": "bool",
    "cloud_known": "bool",
    "tokens": "int",
    "ms": "float",
    "cloud_tokens": "int",
    "cloud_usd": "float",
    "shared_correct": "bool",
    "shared_known": "bool",
    "shared_extra_tokens": "int",
    "redacted": "bool",
    "plain_correct": "bool",
    "plain_known": "bool",
    "logp": "float",
    "answer_logp": "float",
    "margin": "float",
    "first_margin": "float",
    "last_margin": "float",
    "margins": "f32 list",
    "natural_text": "str",
    "natural_called": "bool",
    "natural_completed": "bool",
    "natural_correct": "bool",
    "natural_grade": "float",
    "natural_ended": "bool",
    "natural_tokens": "int",
}


def type_of(column: str) -> str | None:
    """The type of a column in the module's table; None for a column that is not there."""
    return TYPES.get(column) or ("float" if column.startswith(("score_", "tokens_")) else None)


def outcomes(records: Records, side: str) -> np.ndarray:
    """The grades f64[n] of the answers of a side, else bool[n]: whether they are right.

    side: local, lenient, cloud or natural.
    """
    grade = f"{side}_grade"
    return records[grade if grade in records else f"{side}_correct"]


def scores(records: Records) -> dict[str, np.ndarray]:
    """The recorded routers: name -> f64[n], of the columns `score_<name>`."""
    columns = [column for column in records if column.startswith("score_")]
    return {column.removeprefix("score_"): records[column] for column in columns}


def split_of(records: Records) -> str:
    """The name of the split that the prompts are of, for sentences; "held-out" where none says."""
    return " and ".join(name or "held-out" for name in dict.fromkeys(records["split"]))


def require(records: Records, columns: Sequence[str], purpose: str) -> None:
    """Raises UserError where an optional column that `purpose` reads is absent."""
    if missing := [name for name in columns if name not in records]:
        raise UserError(
            f"{purpose}: the records have no column {' and no '.join(missing)}; record it, or "
            "leave this out"
        )


def known(records: Records, also: Sequence[Records] = ()) -> Records:
    """Returns the rows whose cloud verdict is known, here and in each table of `also`, by id.

    Figures that depend on the cloud are over these: an unknown verdict (a call failed, or its
    answer could not be judged) says nothing about it. Raises UserError where no row is left.
    """
    unknown = {key for table in (records, *also) for key in table["id"][~table["cloud_known"]]}
    if not unknown:
        return records
    rows = np.array([key not in unknown for key in records["id"]])
    if not rows.any():
        raise UserError("no cloud verdict is known: nothing can be said about asking the cloud")
    return {name: column[rows] for name, column in records.items()}


def check(records: Mapping[str, Column], name: str) -> Records:
    """The columns (lists or arrays, [n]) in their types, with the defaults filled in.

    Raises UserError for a missing column, columns of unequal length, no rows, an id that is empty
    or occurs twice, and a value that is not of its column's type (NaN). The message names `name`
    (the file), columns and rows (from 1, without a header).
    """
    if missing := [column for column in REQUIRED if column not in records]:
        raise UserError(
            f"{name} has no column {' and no '.join(missing)} (it has "
            f"{', '.join(records) or 'none'}): records need {', '.join(REQUIRED)}, see "
            "collab_jax/records.py"
        )
    n = len(records["id"])
    if odd := [f"{column} {len(values)}" for column, values in records.items() if len(values) != n]:
        raise UserError(f"{name} has columns of unequal length: id {n}, {', '.join(odd)}")
    if n == 0:
        raise UserError(f"{name} holds no rows: nothing can be measured")
    ids = _strings(records["id"])[0]
    _refuse(name, "id", records["id"], ids == "", "empty", ids)
    _refuse_duplicates(name, ids)
    table = {column: _typed(name, column, values, ids) for column, values in records.items()}
    absent = {column: value for column, value in DEFAULTS.items() if column not in table}
    return table | {
        c: np.full(n, value, bool if isinstance(value, bool) else object)
        for c, value in absent.items()
    }


def align(
    a: Records, b: Records, a_name: str = "the first table", b_name: str = "the second table"
) -> Records:
    """`b` with its rows in the order of `a`.

    Raises UserError, with counts and examples, where the prompts differ.
    """
    row = {key: i for i, key in enumerate(b["id"])}
    only_a, only_b = [key for key in a["id"] if key not in row], sorted(row.keys() - set(a["id"]))
    if only_a or only_b:
        unshared = [
            f"{len(only)} only in {name} (as {', '.join(map(repr, only[:3]))})"
            for name, only in ((a_name, only_a), (b_name, only_b))
            if only
        ]
        shared = len(a["id"]) - len(only_a)
        raise UserError(
            f"{a_name} and {b_name} are of other prompts: {shared} ids in both, "
            f"{', '.join(unshared)}; evaluate both on the same prompts, or keep the rows they share"
        )
    order = np.array([row[key] for key in a["id"]])
    same = {column: values[order] for column, values in b.items()}
    for column in ({"prompt", "task", "stratum"} & set(a)) & set(b):
        if not (np.any(a[column] != "") and np.any(same[column] != "")):
            continue  # one of the two says nothing of it
        if (differ := np.flatnonzero(a[column] != same[column])).size:
            raise UserError(
                f"{a_name} and {b_name} have {differ.size} ids with another {column} (as "
                f"{a['id'][differ[0]]!r}): the same id must name the same prompt"
            )
    return same


def read(path: pathlib.Path) -> Records:
    """The records of a .parquet, .jsonl or .csv file. Raises UserError as `check` does."""
    return check(tables.read(pathlib.Path(path)), str(path))


def write(path: pathlib.Path, records: Records) -> None:
    """Writes records to a .parquet, .jsonl or .csv file, complete or not at all."""
    tables.write(pathlib.Path(path), records)


# ---- types: each returns (column [n], good bool[n])


def _typed(name: str, column: str, values: Column, ids: np.ndarray) -> np.ndarray:
    kind = type_of(column)
    if kind is None:
        return values if isinstance(values, np.ndarray) else _objects(values)
    parse, expected = _PARSERS[kind]
    parsed, good = parse(values)
    _refuse(name, column, values, ~good, f"not {expected}", ids)
    return parsed


def _strings(values: Column) -> tuple[np.ndarray, np.ndarray]:
    return _objects(["" if v is None else str(v) for v in values]), np.ones(len(values), bool)


def _bools(values: Column) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(values, np.ndarray) and values.dtype == bool:
        return values, np.ones(len(values), bool)
    words = np.array([str(v).strip().lower() for v in values])
    true = np.isin(words, ("true", "1", "1.0"))
    return true, true | np.isin(words, ("false", "0", "0.0"))


def _floats(values: Column) -> tuple[np.ndarray, np.ndarray]:
    try:
        parsed = np.asarray(values, np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        parsed = None
    if parsed is None or parsed.ndim != 1:
        parsed = np.array([_float(v) for v in values])
    return parsed, ~np.isnan(parsed)


def _float(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _ints(values: Column) -> tuple[np.ndarray, np.ndarray]:
    parsed, _ = _floats(values)
    good = np.isfinite(parsed) & (parsed == np.floor(parsed)) & (parsed >= 0)
    return np.where(good, parsed, 0).astype(np.int64), good


def _traces(values: Column) -> tuple[np.ndarray, np.ndarray]:
    parsed = [_trace(v) for v in values]
    return _objects(parsed), np.array([p is not None for p in parsed], bool)


def _trace(value) -> np.ndarray | None:
    try:  # null becomes NaN
        trace = np.asarray(json.loads(value) if isinstance(value, str) else value, np.float32)
    except (TypeError, ValueError):
        return None
    return np.where(np.isnan(trace), np.float32(-np.inf), trace) if trace.ndim == 1 else None


_PARSERS: dict[str, tuple[Callable[[Column], tuple[np.ndarray, np.ndarray]], str]] = {
    "str": (_strings, "text"),
    "bool": (_bools, "true or false (or 1 or 0)"),
    "int": (_ints, "a whole number from 0"),
    "float": (_floats, "a number"),
    "f32 list": (_traces, "a list of numbers"),
}


def _objects(values: Column) -> np.ndarray:
    """The values as object[n].

    numpy itself would make a matrix of lists of equal length, and pad every text to the longest.
    """
    column = np.empty(len(values), object)
    column[:] = list(values)
    return column


def _refuse(
    name: str, column: str, values: Column, bad: np.ndarray, what: str, ids: np.ndarray
) -> None:
    if (rows := np.flatnonzero(bad)).size:
        i = int(rows[0])
        raise UserError(
            f"{name}: {column} is {what} in {rows.size} of {len(ids)} rows (row {i + 1}, id "
            f"{ids[i]!r}: {str(values[i])[:40]!r}); mend or remove these rows"
            f"{'' if column in REQUIRED else ', or the column'}"
        )


def _refuse_duplicates(name: str, ids: np.ndarray) -> None:
    if len(unique := set(ids)) < len(ids):
        first: dict[str, int] = {}
        i = next(i for i, key in enumerate(ids) if first.setdefault(key, i) != i)
        raise UserError(
            f"{name}: {len(ids) - len(unique)} of {len(ids)} rows repeat an id (rows "
            f"{first[ids[i]] + 1} and {i + 1}: {ids[i]!r}); keep one row a prompt, and each seed "
            "or method in a file of its own"
        )
