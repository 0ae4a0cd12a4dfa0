"""Prompt sources: every format gives the same rows; empty rows are counted, malformed ones named."""

import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laif_jax.config.schema import PromptSource, SymbolsSpec
from laif_jax.data.sources import load_prompts
from laif_jax.records import DataError, write_json, write_jsonl, write_parquet

ROWS = [
    {
        "prompt": f"question {i} \u00e9",
        "completions": {"weak": f"w{i}", "strong": f"s{i}" if i else None},
        "index": i,
    }
    for i in range(12)
]


def write_arrayrecord(path, rows):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row if isinstance(row, bytes) else json.dumps(row).encode())
    writer.close()


def write_tfds(folder, rows):
    import tensorflow_datasets as tfds

    os.makedirs(folder)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="tiny", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="tiny"
    )
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {
            "prompt": text,
            "completions": {"weak": text, "strong": text},
            "index": tfds.features.Scalar(np.int64),
        }
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=100, file_format="array_record")
    writer.initialize_splits(["train"])
    filled = [{**r, "completions": {k: v or "" for k, v in r["completions"].items()}} for r in rows]
    writer.add_examples({"train": filled})
    writer.close_all()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same rows in every format: name -> (kind, path)."""
    import datasets

    root = tmp_path_factory.mktemp("sources")
    write_jsonl(root / "a.jsonl", ROWS)
    write_jsonl(root / "a.jsonl.gz", ROWS)
    write_json(root / "a.json", ROWS)
    write_parquet(root / "a.parquet", ROWS)
    write_arrayrecord(root / "a.array_record", ROWS)
    write_tfds(root / "tiny" / "1.0.0", ROWS)
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(root / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(root / "splits")
    (root / "shards").mkdir()
    write_jsonl(root / "shards" / "1.jsonl", ROWS[:5])
    write_jsonl(root / "shards" / "2.jsonl.gz", ROWS[5:])
    (root / "shards" / "notes.txt").write_text("not data")
    return root


FORMATS = {
    "jsonl": ("jsonl", "a.jsonl"),
    "gzip": ("jsonl", "a.jsonl.gz"),
    "json": ("jsonl", "a.json"),
    "folder": ("jsonl", "shards"),
    "pattern": ("jsonl", "shards/*.jsonl*"),
    "parquet": ("parquet", "a.parquet"),
    "arrayrecord": ("arrayrecord", "a.array_record"),
    "hf saved": ("hf", "saved"),
    "hf split": ("hf", "splits"),
    "tfds": ("tfds", "tiny/1.0.0"),
}


def load(root, kind="jsonl", path="a.jsonl", *, seed=0, shuffle=True, completions="completions", **kwargs):
    source = PromptSource(kind=kind, path=path, completions=completions, **kwargs)
    return load_prompts(source, str(root), seed, shuffle=shuffle)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(stored, name):
    kind, path = FORMATS[name]
    rows = load(stored, kind, path, shuffle=False)
    assert [row.prompt.instruction for row in rows] == [row["prompt"] for row in ROWS]
    assert [row.completions for row in rows] == [
        {k: v for k, v in row["completions"].items() if v is not None} for row in ROWS
    ]
    assert [row.prompt.meta for row in rows] == [{"index": i} for i in range(12)]
    assert [row.prompt.id for row in load(stored, kind, path)] == [row.prompt.id for row in load(stored)]


def test_a_folder_of_data_files_is_a_hugging_face_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("prompt,n\nhello,1\nyou,2\n")
    rows = load(tmp_path, "hf", "data", completions=None, shuffle=False)
    assert [(row.prompt.instruction, row.prompt.meta) for row in rows] == [
        ("hello", {"n": 1}),
        ("you", {"n": 2}),
    ]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12), st.integers(0, 3))
def test_a_limit_is_a_seeded_sample_that_grows_and_knows_no_file_order(tmp_path_factory, order, limit, seed):
    root = tmp_path_factory.mktemp("order")
    write_jsonl(root / "a.jsonl", [ROWS[i] for i in order])
    whole = [row.prompt.id for row in load(root, seed=seed)]
    part = [row.prompt.id for row in load(root, seed=seed, limit=limit)]
    assert part == whole[:limit]
    write_jsonl(root / "b.jsonl", ROWS)
    assert [row.prompt.id for row in load(root, path="b.jsonl", seed=seed, limit=limit)] == part
    in_order = [row.prompt.meta["index"] for row in load(root, seed=seed, limit=limit, shuffle=False)]
    assert in_order == sorted(in_order, key=list(order).index)
    assert len(in_order) == limit


def test_seeds_differ(stored):
    assert [r.prompt.id for r in load(stored, seed=0)] != [r.prompt.id for r in load(stored, seed=1)]


def test_duplicates_and_empty_prompts_are_skipped_and_counted(tmp_path, caplog):
    rows = [
        {"prompt": "a", "completions": {"x": "first"}},
        {"prompt": ""},
        {"prompt": None},
        {"prompt": " \n"},
        {"prompt": []},
        {"prompt": "a", "completions": {"x": "second"}},
        {"prompt": "b", "completions": {"x": " ", "y": None}},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    found = load(tmp_path, shuffle=False)
    assert [row.completions for row in found] == [{"x": "first"}, {}]
    assert vars(found.report) == {"read": 7, "empty": 4, "duplicates": 1, "kept": 2}
    assert "4 with an empty prompt and 1 duplicates were skipped" in caplog.text


def test_lists_of_messages(tmp_path):
    rows = [
        {"chat": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
        {
            "chat": [
                {"from": "human", "value": "q1"},
                {"from": "gpt", "value": "a1"},
                {"from": "human", "value": "q2"},
            ]
        },
        {"chat": [{"role": "user", "content": "whole"}, {"role": "assistant", "content": "dialogue"}]},
        {"chat": [{"role": "assistant", "content": "nobody asked"}]},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    found = load(tmp_path, prompt="chat", completions=None, shuffle=False)
    assert [[m.role for m in row.prompt.messages] for row in found] == [
        ["system", "user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert found[2].completions == {"chat": "dialogue"}
    assert found.report.empty == 1


def test_a_column_of_texts_is_one_generator(tmp_path):
    write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "q", "output": "answer", "completions": "kept", "prompt_id": 3}]
    )
    (row,) = load(tmp_path, completions="output")
    assert row.completions == {"output": "answer"}
    assert row.prompt.meta == {"completions": "kept", "prompt_id": 3}


def test_the_instruction_is_kept_byte_for_byte(tmp_path):
    text = "  keep\r\n my \u2028 spaces\t\n"
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": text}])
    assert load(tmp_path, completions=None)[0].prompt.instruction == text


def test_columns_of_any_type_become_json(tmp_path):
    import datetime

    row = {
        "prompt": "q",
        "when": datetime.datetime(2024, 1, 2),
        "raw": b"b",
        "nan": float("nan"),
        "list": [{"k": 2}],
    }
    write_parquet(tmp_path / "a.parquet", [row])
    meta = load(tmp_path, "parquet", "a.parquet", completions=None)[0].prompt.meta
    assert json.loads(json.dumps(meta, allow_nan=False)) == {
        "when": "2024-01-02T00:00:00",
        "raw": "b",
        "nan": None,
        "list": [{"k": 2}],
    }


# ---- the synthetic world ---------------------------------------------------------------------------------------


def test_the_symbols_world():
    def make(n, split="train", seed=0):
        source = PromptSource(kind="symbols", limit=n, split=split)
        return load_prompts(source, None, seed, SymbolsSpec(symbols=5))

    rows = make(30)
    assert len({row.prompt.id for row in rows}) == 30 == rows.report.kept
    assert [row.prompt for row in make(10)] == [row.prompt for row in rows[:10]]
    held_out = {row.prompt.id for row in make(30, "eval")}
    assert not held_out & {row.prompt.id for row in rows}
    assert [row.prompt for row in make(10, seed=1)] != [row.prompt for row in rows[:10]]


# ---- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "q"}, r"a\.jsonl, line 2: no column `prompt`; there are: promt. Did you mean `promt`\?"),
        ({}, "line 2: no column `prompt`; there are: none"),
        ({"prompt": 3}, "line 2: `prompt` must be a text or a list of messages, found int"),
        ({"prompt": {"role": "user"}}, "line 2: `prompt` must be a text or a list"),
        ({"prompt": ["hello"]}, "line 2: message 1 of `prompt` must be an object"),
        (
            {"prompt": [{"role": "robot", "content": "x"}]},
            "line 2: message 1 of `prompt` has role 'robot'; known: system",
        ),
        (
            {"prompt": [{"role": "user", "content": None}]},
            "line 2: message 1 of `prompt` must have a text .* NoneType",
        ),
        ({"prompt": "q"}, "line 2: no column `completions`; there are: prompt"),
        (
            {"prompt": "q", "completions": ["x"]},
            "line 2: `completions` must map generators to texts.* found list",
        ),
        (
            {"prompt": "q", "completions": {"x": 3}},
            "line 2: the completion of 'x' in `completions` must be a text, found int",
        ),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    write_jsonl(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_source_without_any_prompt_is_an_error(tmp_path):
    for rows in ([], [{"prompt": ""}]):
        write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(DataError, match=rf"a\.jsonl: no prompt in it \({len(rows)} rows read"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("jsonl", "b.jsonl", r"b\.jsonl: no such file.*holds: .*a\.jsonl"),
        ("jsonl", "a.parquet", r"`kind: jsonl` reads .*Set `kind: parquet`"),
        ("parquet", "a.jsonl", r"`kind: parquet` reads .*Set `kind: jsonl`"),
        ("parquet", "shards", r"shards: no \.parquet file there"),
        ("jsonl", "shards/*.json", r"no \.jsonl or .* file there"),
        ("jsonl", "nowhere/*.jsonl", r"no \.jsonl or .* file there"),
        ("arrayrecord", "b.array_record", "no such file"),
        ("hf", "splits", "no split 'train2'; it has: train, test"),
        ("hf", "no/such/folder", "no such file"),
        ("tfds", "tiny/1.0.0", "TFDS data set tiny/1.0.0: cannot be read: Unknown split 'train2'"),
        (
            "tfds",
            "no_such_data_set",
            "TFDS data set no_such_data_set: cannot be read: Dataset no_such_data_set not found",
        ),
    ],
)
def test_a_path_that_leads_nowhere_says_so(stored, kind, path, message):
    kwargs = {"split": "train2"} if kind in ("hf", "tfds") else {}
    with pytest.raises(DataError, match=message):
        load(stored, kind, path, **kwargs)


def test_an_unreachable_hub_says_what_to_do_instead(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"Hub data set nobody/nothing.*Couldn't reach.*save_to_disk"):
        load(tmp_path, "hf", "nobody/nothing")


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_cut_file_is_an_error_in_every_format(tmp_path_factory, cut):
    root = tmp_path_factory.mktemp("cut")
    write_parquet(root / "a.parquet", ROWS)
    write_arrayrecord(root / "a.array_record", ROWS)
    (root / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode()))
    for kind, name in (("parquet", "a.parquet"), ("arrayrecord", "a.array_record"), ("jsonl", "a.jsonl.gz")):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: cut % (len(whole) - 1)])
        with pytest.raises(DataError, match=f"{name}.*(cut short|not valid JSON)"):
            load(root, kind, name)


def test_a_record_that_is_no_json_is_named(tmp_path):
    for record, message in (
        (b"\xff", "not a JSON object"),
        (b"[1]", "a JSON object is expected, found list"),
    ):
        write_arrayrecord(tmp_path / "a.array_record", [ROWS[0], record])
        with pytest.raises(DataError, match="record 2: " + message):
            load(tmp_path, "arrayrecord", "a.array_record")


@pytest.mark.real
@pytest.mark.skipif(
    "LAIF_DATA" not in os.environ, reason="set LAIF_DATA to the folder of the shared real data"
)
def test_real_teacher_files():
    root = os.environ["LAIF_DATA"]
    train = load(root, path="teachers/train.jsonl.gz")
    assert train.report.read == 1192
    assert set(train[0].completions) <= {"gpt-3.5", "gpt-4", "claude", "text-davinci-003"}
    evaluation = load(root, path="teachers/alpaca_eval.jsonl.gz", shuffle=False)
    assert [row.prompt.meta["index"] for row in evaluation] == list(range(805))
    assert not {row.prompt.id for row in evaluation} & {row.prompt.id for row in train}
