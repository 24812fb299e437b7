from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcache.document import Document, only_text
from llmcache.errors import ConfigError, CorpusError
from llmcache.pipeline.files import CorpusReading, documents

PAIRS = [
    ("a", "first"),
    ("b", "two\nlines, a comma and a \t tab"),
    ("c", ""),
    ("d", 'a "quote" and U+2028: \u2028.'),
]


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(pairs: list[tuple[str, str]]) -> bytes:
    return b"".join(json.dumps({"id": id, "text": text}).encode() + b"\n" for id, text in pairs)


def table(pairs: list[tuple[str, str]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([("id", "text"), *pairs])
    return out.getvalue().encode()


def parquet(pairs: list[tuple[str, str]], row_group_size: int = 1000) -> bytes:
    out = io.BytesIO()
    columns = {"id": [id for id, _ in pairs], "text": [text for _, text in pairs]}
    pq.write_table(pa.table(columns), out, row_group_size=row_group_size)
    return out.getvalue()


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    """Write the pairs in the format of the path's ending."""
    plain = path.name.removesuffix(".gz")
    if plain.endswith("sv"):
        content = table(pairs, "\t" if plain.endswith(".tsv") else ",")
    else:
        content = parquet(pairs) if plain.endswith(".parquet") else json_lines(pairs)
    return put(path, gzip.compress(content) if path.suffix == ".gz" else content)


def pairs_of(found: Iterator[Document]) -> list[tuple[str, str]]:
    return [(document.id, only_text(document)) for document in found]


def refusal(path: Path, *, text_field: str = "text", unit: str = "line") -> str:
    """Return the error message of a path. With skip_bad the same error must be counted instead."""
    with pytest.raises(CorpusError) as refused:
        list(documents(path, text_field=text_field, unit=unit))
    reading = CorpusReading()
    list(documents(path, text_field=text_field, unit=unit, skip_bad=True, reading=reading))
    assert reading.bad == 1
    assert reading.errors == [str(refused.value)]
    return str(refused.value)


# -- formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    assert pairs_of(documents(write(tmp_path / f"corpus{ending}", PAIRS))) == PAIRS


@pytest.mark.parametrize("ending", [".JSONL", ".Csv"])
def test_an_ending_may_be_in_capitals(tmp_path: Path, ending: str) -> None:
    content = json_lines(PAIRS) if ending == ".JSONL" else table(PAIRS)
    assert pairs_of(documents(put(tmp_path / f"corpus{ending}", content))) == PAIRS


def test_a_text_file_gives_its_lines_that_are_not_blank(tmp_path: Path) -> None:
    path = put(tmp_path / "notes.txt", "one\n\n  \ntwo \r\nthree\u2028still three")
    assert pairs_of(documents(path)) == [
        ("notes.txt:1", "one"),
        ("notes.txt:4", "two "),
        ("notes.txt:5", "three\u2028still three"),
    ]


@pytest.mark.parametrize("name", ["notes.txt", "notes.txt.gz"])
def test_a_text_file_gives_its_paragraphs(tmp_path: Path, name: str) -> None:
    content = b"\n\none\ntwo\r\n \n\n\nthree"
    path = put(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert pairs_of(documents(path, unit="paragraph")) == [(f"{name}:3", "one\ntwo"), (f"{name}:8", "three")]


def test_json_lines_are_cut_at_newlines_only(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r"
    path = put(tmp_path / "x.jsonl", json.dumps({"id": "1", "text": text}, ensure_ascii=False) + "\r\n\n")
    assert pairs_of(documents(path)) == [("1", text)]


def test_a_json_line_may_be_the_text_itself(tmp_path: Path) -> None:
    path = put(tmp_path / "x.jsonl", '"one"\n\n"two"')
    assert pairs_of(documents(path)) == [("x.jsonl:1", "one"), ("x.jsonl:3", "two")]


def test_ids_are_the_field_or_the_place(tmp_path: Path) -> None:
    lines = [
        '{"id": 7, "text": "a"}',
        '{"id": null, "text": "b"}',
        '{"text": "c"}',
        '{"id": "", "text": "d"}',
    ]
    assert [one.id for one in documents(put(tmp_path / "x.jsonl", "\n".join(lines)))] == [
        "7",
        "x.jsonl:2",
        "x.jsonl:3",
        "",
    ]
    assert [one.id for one in documents(put(tmp_path / "x.csv", 'text\n"a\nb"\nc\n'))] == [
        "x.csv:2",
        "x.csv:4",
    ]
    pq.write_table(pa.table({"id": [7, None], "text": ["a", "b"]}), tmp_path / "x.parquet")
    assert [one.id for one in documents(tmp_path / "x.parquet")] == ["7", "x.parquet:2"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_text_and_id_may_have_other_names(tmp_path: Path, ending: str) -> None:
    if ending == ".parquet":
        pq.write_table(pa.table({"key": ["k"], "text": ["no"], "a.body": ["yes"]}), tmp_path / "x.parquet")
    else:
        put(tmp_path / "x.jsonl", '{"key": "k", "text": "no", "a.body": "yes"}')
        put(tmp_path / "x.csv", "key,text,a.body\nk,no,yes\n")
    found = documents(tmp_path / f"x{ending}", text_field="a.body", id_field="key")
    assert pairs_of(found) == [("k", "yes")]


def test_large_strings_and_dictionaries_of_parquet_are_read(tmp_path: Path) -> None:
    texts = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(
        pa.table({"id": pa.array(["1", "2", "3"], pa.large_string()), "text": texts}), tmp_path / "x.parquet"
    )
    assert pairs_of(documents(tmp_path / "x.parquet")) == [("1", "a"), ("2", "b"), ("3", "a")]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".txt", ".jsonl.gz", ".parquet"])
def test_a_text_of_ten_megabytes_is_read(tmp_path: Path, ending: str) -> None:
    text = "schön " * 1_430_000 + "."
    path = tmp_path / f"big{ending}"
    pairs = [("big", text), ("small", "s")]
    put(path, f"{text}\ns") if ending == ".txt" else write(path, pairs)
    assert [one.text for one in documents(path)] == [text, "s"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".txt"])
def test_a_byte_order_mark_is_dropped(tmp_path: Path, ending: str) -> None:
    content = {".jsonl": b'{"text": "a"}', ".csv": b"text\na\n", ".txt": b"a\n"}[ending]
    assert [one.text for one in documents(put(tmp_path / f"x{ending}", b"\xef\xbb\xbf" + content))] == ["a"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv", "x.txt", "x.jsonl.gz"])
def test_an_empty_file_gives_no_documents(tmp_path: Path, name: str) -> None:
    assert list(documents(put(tmp_path / name, b""))) == []


def test_gzip_is_told_by_the_content_not_the_name(tmp_path: Path) -> None:
    packed = put(tmp_path / "packed.jsonl", gzip.compress(json_lines(PAIRS[:2])) + gzip.compress(json_lines(PAIRS[2:])))
    plain = put(tmp_path / "plain.jsonl.gz", json_lines(PAIRS))
    assert pairs_of(documents(packed)) == PAIRS
    assert pairs_of(documents(plain)) == PAIRS


@given(
    st.lists(st.tuples(st.text(), st.text())),
    st.booleans(),
    st.sampled_from(["x.jsonl", "x.jsonl.gz"]),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_documents_survive_json_lines(
    tmp_path: Path, pairs: list[tuple[str, str]], escaped: bool, name: str
) -> None:
    lines = [json.dumps({"id": id, "text": text}, ensure_ascii=escaped) for id, text in pairs]
    content = "".join(line + "\n" for line in lines).encode()
    path = put(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    reading = CorpusReading()
    assert pairs_of(documents(path, reading=reading)) == pairs
    assert (reading.documents, reading.bad) == (len(pairs), 0)
    assert reading.duplicate_ids == len(pairs) - len({id for id, _ in pairs})


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))), st.sampled_from([",", "\t"]))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_texts_survive_a_table(tmp_path: Path, texts: list[str], delimiter: str) -> None:
    pairs = [(f"d{i}", text) for i, text in enumerate(texts)]
    path = put(tmp_path / ("x.csv" if delimiter == "," else "x.tsv"), table(pairs, delimiter))
    assert pairs_of(documents(path)) == pairs


# -- sources ----------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_name_without_what_is_hidden_or_unknown(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c/y.jsonl", ".hidden.txt", ".git/x.txt", "notes.md", "b.txt.partial"):
        put(tmp_path / name, '"text"\n')
    os.mkfifo(tmp_path / "pipe.txt")
    assert [one.id for one in documents(tmp_path)] == ["a/c/y.jsonl:1", "a/z.txt:1", "b.txt:1"]


def test_links_to_files_are_read_and_loops_of_links_are_not(tmp_path: Path) -> None:
    put(tmp_path / "corpus/a.txt", "a")
    put(tmp_path / "elsewhere.txt", "b")
    (tmp_path / "corpus/loop").symlink_to(tmp_path / "corpus", target_is_directory=True)
    (tmp_path / "corpus/b.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "corpus", target_is_directory=True)
    assert pairs_of(documents(tmp_path / "linked")) == [("a.txt:1", "a"), ("b.txt:1", "b")]


@pytest.mark.parametrize("target", ["nowhere.txt", "b.txt"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    put(tmp_path / "a.txt", "a")
    (tmp_path / "b.txt").symlink_to(tmp_path / target)
    assert "b.txt cannot be read" in refusal(tmp_path)


def test_a_folder_without_readable_files_names_the_endings(tmp_path: Path) -> None:
    put(tmp_path / "notes.md", "x")
    with pytest.raises(CorpusError, match=r"holds no file .*\.jsonl.*\.gz.*\.parquet"):
        list(documents(tmp_path, skip_bad=True))


@pytest.mark.parametrize("name", ["notes.md", "x.parquet.gz", "gz"])
def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError, match=rf"{name} .*\.jsonl.*\.parquet"):
        list(documents(put(tmp_path / name, "x"), skip_bad=True))


def test_a_missing_path_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    reading = CorpusReading()
    found = documents([put(tmp_path / "a.txt", "a"), tmp_path / "b.txt"], skip_bad=True, reading=reading)
    with pytest.raises(CorpusError, match=r"b\.txt does not exist"):
        next(found)
    assert reading == CorpusReading()


def test_nothing_is_opened_before_the_first_document_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "later.txt"
    found = documents(path)
    put(path, "here now")
    assert next(found).text == "here now"


def test_sources_are_read_in_the_order_given(tmp_path: Path) -> None:
    one, two = put(tmp_path / "1.txt", "one"), put(tmp_path / "2.txt", "two")
    assert [document.text for document in documents([str(two), one, two])] == ["two", "one", "two"]
    assert [document.text for document in documents(str(two))] == ["two"]


def test_a_file_name_that_is_not_utf_8_gives_ids_that_are(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    put(path, "a")
    assert [one.id for one in documents(path)] == ["\\xff.txt:1"]


class _Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def test_standard_input_is_json_lines_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", _Stdin(b'"one"\n{"text": "two"}\n'))
    assert pairs_of(documents("-")) == [("stdin:1", "one"), ("stdin:2", "two")]
    monkeypatch.setattr(sys, "stdin", stdin := _Stdin(b"one\ntwo\n"))
    assert [one.text for one in documents(["-"], stdin_format="txt")] == ["one", "two"]
    assert not stdin.buffer.closed
    with pytest.raises(ConfigError, match="jsonl, csv, tsv, txt"):
        documents("-", stdin_format="parquet")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read_packed_or_not(pack: type[bytes]) -> None:
    code = "from llmcache.pipeline.files import documents\nfor one in documents('-'): print(one.id, one.text)"
    done = subprocess.run([sys.executable, "-c", code], input=pack(json_lines(PAIRS[:1])), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a first\n", b"")


def test_bad_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", _Stdin(b'"one"\nno\n'))
    with pytest.raises(CorpusError, match="standard input line 2 is not JSON"):
        list(documents("-"))


def test_an_unknown_unit_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="line, paragraph"):
        documents("x.txt", unit="page")


# -- bad input --------------------------------------------------------------------------------------------

BAD_LINES = {
    b'{"body": "x", "id": 1}': "has no field 'text', only 'body', 'id'; .*--text-field",
    b"{}": "has no field 'text', only none",
    b'{"text": null}': "has null under 'text'",
    b'{"text": 5}': "has a number under 'text'",
    b'{"text": ["a"]}': "has a list under 'text'",
    b'{"text": "x", "id": 1.5}': "has a number under 'id'.*--id-field",
    b'{"text": "x", "id": true}': "has a truth value under 'id'",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": "x", "id": "\\udfff"}': "half of a surrogate pair",
    b'{"text": "cut': "is not JSON \\(Unterminated string.*, column 10",
    b"text": "is not JSON",
    b"3": "is a number, neither an object nor a text",
    b"null": "is null",
    b'{"text": "\xff"}': "is not UTF-8 \\(byte 0xff at place 10\\).*iconv",
    b'{"text": "a\0b"}': "is not JSON",
    b"[" * 100_000: "is not JSON",
    b"9" * 5_000: "is not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_json_line_is_named_or_counted(tmp_path: Path, line: bytes) -> None:
    path = put(tmp_path / "x.jsonl", b'"before"\n' + line + b'\n"after"\n')
    assert pairs_of(documents(path, skip_bad=True)) == [("x.jsonl:1", "before"), ("x.jsonl:3", "after")]
    message = refusal(path)
    assert message.startswith(f"{path} line 2 ")
    assert "--skip-bad" in message
    with pytest.raises(CorpusError, match=BAD_LINES[line]):
        list(documents(path))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"b,one,two\n", "has 3 cells where the header has 2"),
        (b"b\n", "has 1 cells"),
        (b"b,\xff\n", "not UTF-8"),
        (b"b,a\0b\n", "NUL"),
        (b'b,"one" two\n', "is not a CSV row"),
        (b'"b\n\xff",x\n', "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, row: bytes, said: str) -> None:
    path = put(tmp_path / "x.csv", b'id,text\na,"1\n2"\n' + row + b"c,3\n")
    assert pairs_of(documents(path, skip_bad=True)) == [("a", "1\n2"), ("c", "3")]
    assert f"{path} line 4 " in refusal(path)
    assert said in refusal(path)


def test_an_open_quote_does_not_make_one_text_of_the_rest(tmp_path: Path) -> None:
    path = put(tmp_path / "x.csv", 'id,text\na,1\nb,"open\nc,3\n')
    assert "line 3 is not a CSV row" in refusal(path)
    assert pairs_of(documents(path, skip_bad=True)) == [("a", "1")]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_a_table_without_the_column_names_those_it_has(tmp_path: Path, ending: str) -> None:
    assert "has no field 'body', only 'id', 'text'; name the right one (--text-field)" in refusal(
        write(tmp_path / f"x{ending}", PAIRS), text_field="body"
    )


def test_of_very_many_columns_ten_are_named(tmp_path: Path) -> None:
    assert "'c9' and 90 more;" in refusal(put(tmp_path / "x.csv", ",".join(f"c{i}" for i in range(100))))


@pytest.mark.parametrize("unit", ["line", "paragraph"])
@pytest.mark.parametrize(("bad", "said"), [(b"\xe9t\xe9", "is not UTF-8 (byte 0xe9"), (b"a\0b", "NUL")])
def test_bad_bytes_in_a_text_file_are_named(tmp_path: Path, unit: str, bad: bytes, said: str) -> None:
    path = put(tmp_path / "x.txt", b"one\n\n" + bad + b"\n\ntwo")
    assert f"{path} line 3 " in refusal(path, unit=unit)
    assert said in refusal(path, unit=unit)
    assert [one.text for one in documents(path, unit=unit, skip_bad=True)] == ["one", "two"]


def test_utf_16_is_named_rather_than_read(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 1 is not UTF-8 .*iconv"):
        list(documents(put(tmp_path / "x.txt", "text".encode("utf-16"))))


@pytest.mark.parametrize("values", [[None], [5], [b"bytes"], [{"a": "b"}]])
def test_a_column_that_is_not_text_is_named_by_row(tmp_path: Path, values: list[object]) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
    assert "x.parquet row 1 has " in refusal(tmp_path / "x.parquet")


def test_undecodable_bytes_in_parquet_are_named_by_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    assert "row 2 is not UTF-8" in refusal(tmp_path / "x.parquet")
    assert [one.text for one in documents(tmp_path / "x.parquet", skip_bad=True)] == ["a", "c"]


MANY = [(f"d{i}", Random(i).randbytes(20).hex()) for i in range(5_000)]  # gzip barely compresses these


@pytest.mark.parametrize("keep", [5, 3_000, -4])
def test_a_cut_gzip_file_gives_what_is_whole(tmp_path: Path, keep: int) -> None:
    path = put(tmp_path / "x.jsonl.gz", gzip.compress(json_lines(MANY))[:keep])
    other = put(tmp_path / "y.txt", "next file")
    assert "is a gzip file that is cut short or damaged" in refusal(path)
    found = pairs_of(documents([path, other], skip_bad=True))
    assert found == [*MANY[: len(found) - 1], ("y.txt:1", "next file")]
    assert len(found) > 1 or keep == 5


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(json_lines(MANY)))
    content[-6] ^= 0xFF  # of the checksum
    assert "CRC" in refusal(put(tmp_path / "x.jsonl.gz", bytes(content)))


def test_a_parquet_file_damaged_in_the_middle_gives_the_rows_before(tmp_path: Path) -> None:
    content = bytearray(parquet(MANY, row_group_size=1_000))
    content[len(content) // 2 : len(content) // 2 + 60_000] = bytes(60_000)
    path = put(tmp_path / "x.parquet", bytes(content))
    other = put(tmp_path / "y.txt", "next file")
    assert "is not a whole Parquet file" in refusal(path)
    found = pairs_of(documents([path, other], skip_bad=True))
    assert found == [*MANY[: len(found) - 1], ("y.txt:1", "next file")]
    assert 1_000 <= len(found) < 4_000


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello, this is no Parquet file", parquet(MANY)[:-10]])
def test_what_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    assert "is not a whole Parquet file" in refusal(put(tmp_path / "x.parquet", content))


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"PK\x03\x04rest", "zip"), (b"\x28\xb5\x2f\xfdrest", "zstd"), (parquet(PAIRS), "parquet")],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = put(tmp_path / "x.jsonl", content)
    with pytest.raises(CorpusError, match=f"is a {kind} file by its content"):
        list(documents(path))


def test_a_line_beyond_the_limit_ends_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcache.pipeline.formats.RECORD_LIMIT", 100)
    path = put(tmp_path / "x.txt", b"short\n" + b"x" * 150)
    assert "line 2 is longer than 100 bytes" in refusal(path)
    path = put(tmp_path / "y.txt", b"short\n" * 50)
    assert "line 1 begins a paragraph of more than 100 bytes" in refusal(path, unit="paragraph")


# -- counts and memory ------------------------------------------------------------------------------------


def test_a_reading_counts_what_was_read(tmp_path: Path) -> None:
    one = put(
        tmp_path / "a.jsonl",
        '{"id": "x", "text": "1"}\n{"id": "y", "text": "2"}\nno\n{"id": "x", "text": "3"}\n',
    )
    two = put(tmp_path / "b.jsonl", '{"id": "y", "text": "4"}\n' + "no\n" * 9)
    reading = CorpusReading()
    assert [document.text for document in documents([one, two], skip_bad=True, reading=reading)] == [
        "1",
        "2",
        "3",
        "4",
    ]
    assert (reading.files, reading.documents, reading.bad, reading.duplicate_ids) == (2, 4, 10, 2)
    assert reading.bytes == one.stat().st_size + two.stat().st_size
    assert len(reading.errors) == 5
    assert reading.errors[0].startswith(f"{one} line 3 ")


def test_a_refused_record_is_counted_too(tmp_path: Path) -> None:
    reading = CorpusReading()
    with pytest.raises(CorpusError):
        list(documents(put(tmp_path / "x.jsonl", '"a"\nno\n'), reading=reading))
    assert (reading.documents, reading.bad) == (1, 1)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".txt", ".jsonl.gz"])
def test_a_long_file_is_not_held_in_memory(tmp_path: Path, ending: str) -> None:
    texts = [f"{i} " + "word " * 200 for i in range(10_000)]
    path = tmp_path / f"long{ending}"
    put(path, "\n".join(texts)) if ending == ".txt" else write(path, [(str(i), text) for i, text in enumerate(texts)])
    del texts
    tracemalloc.start()
    try:
        assert sum(1 for _ in documents(path)) == 10_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20  # of ten megabytes


def test_reading_a_corpus_imports_neither_torch_nor_pyarrow(tmp_path: Path) -> None:
    put(tmp_path / "x.jsonl", json_lines(PAIRS))
    code = (
        "import sys\nfrom llmcache.pipeline.files import documents\nimport llmcache.pipeline.writers\n"
        f"assert len(list(documents({str(tmp_path)!r}))) == 4\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# -- the demo's corpora -----------------------------------------------------------------------------------


def demo(name: str) -> dict[str, dict[str, str]]:
    path = Path(__file__).parents[2] / "data" / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    assert [(one["id"], one["text"]) for one in records] == pairs_of(documents(path))
    assert len({one["id"] for one in records}) == len(records)
    return {one["id"]: one for one in records}


def test_the_records_of_the_demo_are_of_the_kinds_they_say() -> None:
    today, tomorrow = demo("demo"), demo("demo_tomorrow")
    texts = set[str]()
    for one in today.values():
        assert one["kind"] == ("repeat" if one["text"] in texts else "new")
        assert one["kind"] == "new" or today[one["of"]]["text"] == one["text"]
        texts.add(one["text"])
    for one in tomorrow.values():
        assert one["kind"] in ("new", "repeat", "revision", "rewording")
        assert (one["text"] in texts) == (one["kind"] == "repeat")
        assert one["kind"] == "new" or (today[one["of"]]["text"] == one["text"]) == (one["kind"] == "repeat")
