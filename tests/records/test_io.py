"""Files of rows: what is written comes back equal; what is cut, damaged or malformed is named, not half read."""

import gzip
import json
import re
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import laif_jax
from laif_jax.records import (
    DataError,
    Prompt,
    append_jsonl,
    check_writable,
    file_sha256,
    read_jsonl,
    read_rows,
    write_json,
    write_jsonl,
    write_parquet,
)
from tests.bucket import bucket
from tests.records.strategies import objects, prompts

same_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINES = "".join(json.dumps({"n": i, "text": "some text " * 3}) + "\n" for i in range(200))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@same_folder
@given(rows=st.lists(objects, max_size=4))
def test_jsonl_round_trip(tmp_path, name, rows):
    assert write_jsonl(tmp_path / name, rows) == len(rows)
    assert list(read_rows(tmp_path / name)) == rows
    assert not list(tmp_path.glob(".*.tmp"))


@same_folder
@given(rows=st.lists(prompts, min_size=1, max_size=4))
def test_records_round_trip_through_every_format(tmp_path, rows):
    write_jsonl(tmp_path / "p.jsonl", rows)
    write_json(tmp_path / "p.json", [row.to_row() for row in rows])
    for name in ("p.jsonl", "p.json"):
        assert [Prompt.from_row(row) for row in read_rows(tmp_path / name)] == rows


def test_parquet_round_trip_keeps_empty_objects_and_each_rows_own_keys(tmp_path):
    rows = [Prompt.from_text("a"), Prompt.from_text("b", k=1), Prompt.from_text("c", other={"x": [1, None]})]
    assert write_parquet(tmp_path / "p.parquet", rows) == 3
    assert [Prompt.from_row(row) for row in read_rows(tmp_path / "p.parquet")] == rows


def test_same_rows_give_the_same_bytes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.gz", [{"a": 1}])
    write_jsonl(tmp_path / "b.jsonl.gz", [{"a": 1}])
    assert file_sha256(tmp_path / "a.jsonl.gz") == file_sha256(tmp_path / "b.jsonl.gz")


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]


@given(st.data())
def test_a_gzip_file_cut_anywhere_is_an_error_and_never_a_shorter_file(tmp_path_factory, data):
    whole = gzip.compress(LINES.encode())
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / "a.jsonl.gz"
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz.*(cut short|not valid JSON)"):
        list(read_jsonl(path))


@given(st.data())
def test_a_damaged_gzip_file_is_an_error(tmp_path_factory, data):
    whole = bytearray(gzip.compress(LINES.encode()))
    at = data.draw(
        st.integers(10, len(whole) - 5)
    )  # past the header, whose fields (time, system) mean nothing
    whole[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.jsonl.gz"
    path.write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        list(read_jsonl(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        (b'{"a": 1}\n[1, 2]\n', "line 2: a JSON object is expected, found list"),
        (b'{"a": 1}\n\n7\n', "line 3: a JSON object is expected, found int"),
        (b'{"a": "\xff\xfe"}\n', "cut short, damaged"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: not valid JSON"),
        (b"[" * 200_000 + b"\n", "line 1: not valid JSON"),
        (gzip.compress(b'{"a": 1}\n'), "cut short, damaged, or not what its name says"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl.*" + message):
        list(read_jsonl(path))


def test_rows_before_a_malformed_line_are_still_yielded(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnope\n')
    reader = read_jsonl(path)
    assert next(reader) == {"a": 1}
    with pytest.raises(DataError, match="line 2"):
        next(reader)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b'{"a": 1}', "a JSON list of objects is expected, found dict"),
        ("a.json", b'[{"a": 1}, 3]', "row 2: a JSON object is expected, found int"),
        ("a.json", b"\xff", "cut short, damaged"),
        ("a.json.gz", b"[]", "cut short, damaged"),
        ("a.json.gz", gzip.compress(b"[]")[:-9], "cut short, damaged"),
        ("a.jsonl.gz", b"{}", "cut short, damaged"),
        ("a.jsonl.gz", b"", "cut short"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.parquet", b"PAR1 but no more", "not a readable Parquet file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name + ".*" + message):
        list(read_rows(tmp_path / name))


@given(st.integers(1, 400))
def test_a_cut_parquet_file_is_an_error(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "a.parquet"
    write_parquet(path, [{"n": i, "text": str(i)} for i in range(50)])
    whole = path.read_bytes()
    path.write_bytes(whole[: -min(cut, len(whole))])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_missing_file_and_a_folder_are_named(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}: no such file"):
        list(read_rows(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"{name}: is a folder"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, write):
    path = tmp_path / "a.out"
    write(path, [{"a": 1}])
    before = path.read_bytes()

    def rows():
        yield {"a": 2}
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(path, rows())
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": object()}])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.out"]


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gzip.GzipFile.write", full)
    with pytest.raises(
        OSError, match=r"cannot write .*a\.jsonl\.gz: No space left on device\. Free space"
    ) as error:
        write_jsonl(tmp_path / "a.jsonl.gz", [{"a": 1}])
    assert error.value.errno == 28
    assert not list(tmp_path.iterdir())


def test_append_closes_a_line_that_was_left_unfinished(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    append_jsonl(path, {"a": "\u00e9"})
    append_jsonl(path, {"a": "\ud800"})
    assert list(read_jsonl(path)) == [{"a": "\u00e9"}, {"a": "\ud800"}]
    with path.open("ab") as file:
        file.write(b'{"a": 3')  # killed here
    append_jsonl(path, {"a": 4})
    assert path.read_text().splitlines()[2:] == ['{"a": 3', '{"a": 4}']


def test_sha256_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(zlib.compress(b"x") * 1000)
    import hashlib

    assert file_sha256(path, chunk=7) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_in_a_bucket_a_file_is_written_anew_to_be_appended_to():
    with bucket() as objects:
        path = "gs://box/deep/rows.jsonl"
        append_jsonl(path, {"a": 1})
        append_jsonl(path, {"a": 2})
        objects.put("box/deep/rows.jsonl", objects.get("box/deep/rows.jsonl") + b'{"cut')
        append_jsonl(path, {"a": 3})
        lines = objects.get("box/deep/rows.jsonl").decode().splitlines()
    assert lines == ['{"a": 1}', '{"a": 2}', '{"cut', '{"a": 3}']


def test_nothing_else_appends_by_the_mode_of_a_file():
    """In a bucket that would write over what is there. The one exception is a cassette, which is on a disk."""
    appends = re.compile(r"""open\([^()]*["'](a|ab|at|a\+|ab\+)["']""")
    root = Path(laif_jax.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if appends.search(path.read_text())}
    assert found == {"records/io.py", "labeling/providers/cassette.py"}


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    with bucket() as objects:
        check_writable("gs://box/new")
        assert not objects.names()


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"cannot write to {tmp_path}/file/below: .*set `out` elsewhere"):
        check_writable(tmp_path / "file" / "below")
    with bucket() as objects:
        objects.read_only = True
        with pytest.raises(OSError, match=r"cannot write to gs://box/runs: PermissionError: .*403"):
            check_writable("gs://box/runs")
