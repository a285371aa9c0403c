import csv
import json
import subprocess
import sys

import pytest
from data_zoo import write_jsonl

from jaxtune.data import read
from jaxtune.errors import UserError

ROWS = [{"prompt": "a\nb", "completion": 'c,"d"'}, {"prompt": "é", "completion": ""}]


def rows(path):
    return [row for _, row in read(str(path))]


def test_every_file_format_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "lines.json", ROWS)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "list.json", "a.csv", "a.tsv", "a.parquet"):
        assert rows(tmp_path / name) == ROWS, name


def test_byte_order_marks_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "x"}\n\n{"text": "y"}\n')
    source = read(str(tmp_path / "a.jsonl"))
    assert list(source) == [(2, {"text": "x"}), (4, {"text": "y"})]
    assert source.where(4) == f"{tmp_path / 'a.jsonl'}:4"


def test_text_is_cut_at_blank_lines_or_at_document_marks(tmp_path):
    (tmp_path / "a.txt").write_text("one\nmore\n\n\ntwo\n")
    (tmp_path / "b.txt").write_text("one\n\nmore\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert list(read(str(tmp_path / "a.txt"))) == [(1, {"text": "one\nmore"}), (5, {"text": "two"})]
    assert list(read(str(tmp_path / "b.txt"))) == [(1, {"text": "one\n\nmore"}), (5, {"text": "two"})]


def test_csv_rows_are_numbered_by_the_line_they_start_on(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"x\ny",1\nz,2\n')
    assert [number for number, _ in read(str(tmp_path / "a.csv"))] == [2, 4]


def test_saved_data_sets_and_their_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "single")
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert rows(tmp_path / "single") == rows(tmp_path / "both") == ROWS
    assert rows(f"{tmp_path / 'both'}:test") == ROWS[:1]
    with pytest.raises(UserError, match=r"no split 'dev'. Found: train, test"):
        read(f"{tmp_path / 'both'}:dev")
    assert read(str(tmp_path / "both")).digest() != read(f"{tmp_path / 'both'}:test").digest()


def test_hub_ids_are_loaded_by_datasets_with_a_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows("openai/gsm8k") == rows("squad:validation") == ROWS
    assert asked == [("openai/gsm8k", "train"), ("squad", "validation")]
    with pytest.raises(UserError, match=r"no/such: no such file here, and as a hub id .* doesn't exist"):
        rows("no/such")


def test_digest_follows_the_content_and_not_the_name(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", ROWS)
    assert read(a).digest() == read(b).digest()
    write_jsonl(tmp_path / "b.jsonl", ROWS[::-1])
    assert read(a).digest() != read(b).digest()
    (tmp_path / "a.csv").write_text("text\n\nx\n")
    (tmp_path / "a.txt").write_text("text\n\nx\n")
    assert read(str(tmp_path / "a.csv")).digest() != read(str(tmp_path / "a.txt")).digest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: malformed JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: expected an object .* found a list"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"a\.json:2: malformed JSON"),
        ("a.json", '[{"a": 1}, "x"]', r"a\.json, row 2: expected an object .* found text"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl: no rows"),
        ("a.csv", "a,b\n", r"a\.csv: no rows"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: 1 fields, but the header has 2 \(a, b\)"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: the header needs distinct column names"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv:2: malformed csv"),
        ("a.parquet", "no", r"a\.parquet: not a readable parquet file"),
        ("a.arrow", "ARROW1", r"a\.arrow: not a readable arrow file"),
        ("a.md", "# x", r"a\.md: cannot read a \.md"),
        ("a.parquet.gz", "x", r"a\.parquet\.gz: a \.parquet file is compressed inside"),
        ("a.pkl", "x", r"a\.pkl: \.pkl files can run code"),
        ("a.xml", "x", r"a\.xml: cannot read a \.xml"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        rows(tmp_path / name)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "e"}\n' + '{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.jsonl:2: not UTF-8 text \(.* at byte 11 of the line"):
        rows(tmp_path / "a.jsonl")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file. Did you mean 'train\.jsonl'"):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="no folder"):
        read(str(tmp_path / "no" / "train.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: a folder without data files \(known: \.jsonl"):
        read(str(tmp_path / "empty"))


def test_data_sets_load_where_the_command_hides_torch(tmp_path):
    """The library asks `sys.modules` for torch when it hashes a builder's settings."""
    file = tmp_path / "rows.json"
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxtune.data.sources import _datasets\n"
        f"rows = _datasets().load_dataset('json', data_files={str(file)!r}, split='train', "
        f"cache_dir={str(tmp_path)!r})\n"
        "assert [row['text'] for row in rows] == ['a', 'b']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
