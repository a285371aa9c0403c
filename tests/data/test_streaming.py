"""Rows on disk: their batches, their cache, and how much of them is in memory."""

import errno
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import compiled, home  # noqa: F401
from test_batches import LENGTHS, equal, make_rows, rows_in

from jaxtune.cli import main
from jaxtune.data import StreamedBatches, cache, load_tokenizer, prepare, read, tokenize
from jaxtune.data.blocks import Blocks, Streamed
from jaxtune.data.packing import pack
from jaxtune.errors import UserError


def on_disk(folder, lengths, rows_a_block, first=1, longest=24):
    """`make_rows` as blocks that a list holds."""
    rows = make_rows(lengths, first)
    parts = [rows.select(np.arange(i, min(i + rows_a_block, len(rows)))) for i in range(0, len(rows), rows_a_block)]
    kept = np.array([len(part) for part in parts])
    counts = np.bincount(rows.length, minlength=longest + 1)
    return Streamed(folder, lambda i, verify: parts[i], lambda rows, report: rows, kept, counts)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_an_epoch_has_each_row_once_and_a_step_needs_none_before_it(
    tmp_path_factory, lengths, size, window, packing, seed
):
    rows = on_disk(tmp_path_factory.mktemp("blocks"), lengths, size)

    def stream():
        return StreamedBatches([rows], batch_size=1, max_length=24, packing=packing, seed=seed, window=window)

    in_order, backwards = stream(), stream()
    steps = in_order.steps(2)
    wanted = [in_order.batch(step) for step in range(steps)]
    assert all(equal(backwards.batch(step), wanted[step]) for step in reversed(range(steps)))
    once, twice = wanted[: steps // 2], wanted[steps // 2 :]
    for epoch in (once, twice):
        assert sorted(row for batch in epoch for row in rows_in(batch)) == list(range(1, len(lengths) + 1))
    if packing:  # as few as the blocks allow, whatever the order of the rows
        packed = [len(pack(np.array(lengths[i : i + size]), 24)) for i in range(0, len(lengths), size)]
        assert steps == 2 * sum(packed)


def test_rows_are_shuffled_over_a_window_and_blocks_over_all(tmp_path):
    rows = on_disk(tmp_path, [4] * 6400, 100)
    stream = StreamedBatches([rows], batch_size=100, max_length=8, seed=1, window=8)
    blocks = [{(row - 1) // 100 for row in rows_in(stream.batch(step))} for step in range(64)]
    assert min(map(len, blocks)) == 8 and len(set().union(*blocks[:8])) == 8  # a batch from each of the window's blocks
    windows = [sorted(set().union(*blocks[i : i + 8])) for i in range(0, 64, 8)]
    assert sorted(block for one in windows for block in one) == list(range(64))
    assert any(b - a > 1 for a, b in pairwise(windows[0]))
    again = [{(row - 1) // 100 for row in rows_in(stream.batch(step))} for step in range(64, 72)]
    assert again != blocks[:8]


@pytest.mark.parametrize("packing", [False, True])
def test_weights_are_shares_of_rows(packing, tmp_path):
    few, many = on_disk(tmp_path, [12] * 90, 16), on_disk(tmp_path, [3] * 3000, 512, first=1000)
    kwargs = {"batch_size": 4, "max_length": 24, "packing": packing}
    stream, other = (StreamedBatches([few, many], weights=[1, 3], **kwargs) for _ in range(2))
    seen = [row for step in range(round(stream.steps_per_epoch)) for row in rows_in(stream.batch(step))]
    assert np.mean([row < 1000 for row in seen]) == pytest.approx(0.25, abs=0.02)
    assert len(seen) == pytest.approx(3090, rel=0.02) and len({row for row in seen if row < 1000}) == 90
    assert equal(other.batch(700), stream.batch(700))


# ------------------------------------------------------------------------------------------------------ the cache


@pytest.fixture
def small_blocks(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "BLOCK_ROWS", 64)
    monkeypatch.setattr(tokenize, "CHUNK", 32)
    return tmp_path / "cache" / "tokens"


def write(path, n):
    return runs.write_jsonl(path, [{"prompt": f"{i} is ", "completion": "x" * (i * 7 % 23)} for i in range(n)])


def opened(home, file, **options):  # noqa: F811
    tokenizer = load_tokenizer(home / "model")
    return prepare(tokenizer, str(file), **{"max_length": 24, "vocab_size": 258, "say": [].append} | options)


@pytest.mark.parametrize("overlength", ["drop", "truncate", "split"])
def test_rows_and_report_are_those_of_rows_in_memory(overlength, home, small_blocks, tmp_path):  # noqa: F811
    file = write(tmp_path / "rows.jsonl", 300)
    whole, _, told = opened(home, file, overlength=overlength)
    for _ in range(2):  # counted, and found counted
        [rows], _, report = opened(home, file, overlength=overlength, streaming=True)
        assert report.lines() == told.lines() and report.train_rows == len(whole[0])
        parts = [rows.block(i) for i in range(len(rows.kept))]
        assert len(parts) == 5 and rows.kept.tolist() == [len(part) for part in parts]
        found = [(tuple(ids), tuple(mask)) for part in parts for ids, mask in map(part.__getitem__, range(len(part)))]
        assert found == [(tuple(ids), tuple(mask)) for ids, mask in map(whole[0].__getitem__, range(len(whole[0])))]
        assert [part.where(0) for part in parts][1].startswith(str(file)) and rows.longest == max(whole[0].length)


def test_a_tokenisation_that_is_killed_goes_on_and_ends_with_the_same_bytes(
    home,  # noqa: F811
    small_blocks,
    tmp_path,
    monkeypatch,
):
    file = write(tmp_path / "rows.jsonl", 300)
    opened(home, file, streaming=True)
    [folder] = small_blocks.iterdir()
    wanted = {p.name: p.read_bytes() for p in folder.iterdir()}
    encode, left = tokenize.Encoder.encode, [None]

    def counting(self, places, examples):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        done.extend(places)
        return encode(self, places, examples)

    monkeypatch.setattr(tokenize.Encoder, "encode", counting)
    for chunks in (1, 5, 9):  # in the first block, in the middle of the third, and in the last but one
        folder.rename(tmp_path / f"before{chunks}")
        done, left[0] = [], chunks
        with pytest.raises(KeyboardInterrupt):
            opened(home, file, streaming=True)
        assert not folder.exists() and len(done) == 32 * chunks
        done, left[0] = [], 99
        opened(home, file, streaming=True)
        assert len(done) == 300 - 64 * (chunks // 2)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == wanted
        assert [p.name for p in small_blocks.iterdir()] == [folder.name]
    folder.rename(tmp_path / "before")
    with monkeypatch.context() as patch:  # as it is closed, which takes long for many rows
        patch.setattr(cache, "hash_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            opened(home, file, streaming=True)
    done, left[0] = [], 99
    opened(home, file, streaming=True)
    assert len(done) == 300 - 256 and {p.name: p.read_bytes() for p in folder.iterdir()} == wanted


def stopped(*given):
    raise KeyboardInterrupt


def test_a_table_that_is_too_small_is_found_again(home, small_blocks, tmp_path):  # noqa: F811
    """Also where the rows were counted for another model."""
    file = write(tmp_path / "rows.jsonl", 300)
    opened(home, file, streaming=True, vocab_size=2000)
    for _ in range(2):
        with pytest.raises(UserError, match="larger than the model's embedding"):
            opened(home, file, streaming=True, vocab_size=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.os, "fsync", full_disk)
        with pytest.raises(UserError, match=r"No room is left.*JAXTUNE_CACHE"):
            opened(home, write(tmp_path / "more.jsonl", 301), streaming=True)


def full_disk(*given):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_damaged_block_is_found_when_it_is_read(home, small_blocks, tmp_path):  # noqa: F811
    file = write(tmp_path / "rows.jsonl", 300)
    [rows], _, _ = opened(home, file, streaming=True)
    tokens = next(small_blocks.glob("*/tokens.bin"))
    data = bytearray(tokens.read_bytes())
    data[-3] ^= 4
    tokens.write_bytes(data)
    [rows], _, _ = opened(home, file, streaming=True)
    rows.block(0)
    with pytest.raises(UserError, match=r"Block 5 of the tokens in .* is damaged; remove that folder"):
        rows.block(4)


def test_memory_does_not_grow_with_the_rows(home, small_blocks, tmp_path):  # noqa: F811
    peaks = []
    for n in (1500, 12000):
        file = write(tmp_path / f"{n}.jsonl", n)
        tracemalloc.start()
        [rows], _, _ = opened(home, file, streaming=True)
        stream = StreamedBatches([rows], batch_size=8, max_length=24, packing=True, window=4)
        for step in range(stream.steps(1)):
            stream.batch(step)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        blocks = stream._assembler.rows
        assert isinstance(blocks, Blocks) and len(blocks._held) <= 8
    assert peaks[1] < 1.3 * peaks[0]  # of eight times the rows


def test_a_data_set_of_datasets_is_read_as_it_arrives(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    for name in ("a", "b"):
        runs.write_jsonl(folder / "data" / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(3)])
    source = read(str(folder), streaming=True)
    assert [row["text"] for _, row in source] == ["a0", "a1", "a2", "b0", "b1", "b2"] and source.digest()
    assert source.digest() == read(str(folder), streaming=True).digest() != read(f"{folder}:train").digest()
    runs.write_jsonl(folder / "data" / "b.jsonl", [{"other": 1}])
    with pytest.raises(UserError, match="`datasets` cannot read on"):
        list(read(str(folder), streaming=True))


# ---------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__eval_fraction": 0.1}, "data.eval_fraction does not go with data.streaming"),
        ({"data__group_by_length": "true"}, "data.group_by_length does not go with data.streaming"),
        ({"data__cache": "false"}, "data.cache=false does not go with data.streaming"),
        ({"train__cache_features": "on"}, "train.cache_features=on does not go with data.streaming"),
        ({"data__canaries": "1,2"}, "data.canaries does not go with data.streaming"),
        ({"objective__name": "preference"}, "data.streaming does not go with objective.name=preference"),
    ],
)
def test_what_needs_all_rows_is_refused(settings, message, home, capsys):  # noqa: F811
    assert main(runs.command(home, None, "--dry-run", data__streaming="true", **settings)) == 2
    assert message in capsys.readouterr().err


def test_a_run_opens_its_rows_on_disk(home, capsys):  # noqa: F811
    assert main(runs.command(home, None, "--dry-run", data__streaming="true", data__packing="true")) == 0
    assert "data.streaming: 40 rows lie on disk" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_in_its_stream(home, tmp_path, capsys, monkeypatch):  # noqa: F811
    flags = {"data__streaming": "true", "data__packing": "true", "data__max_length": 32}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(runs.command(home, whole, **flags)) == 0
    batch = StreamedBatches.batch
    with monkeypatch.context() as patch:
        patch.setattr(StreamedBatches, "batch", lambda self, step: batch(self, step) if step < 8 else 1 / 0)
        assert main(runs.command(home, parts, **flags)) == 1
    assert main(runs.command(home, parts, **flags)) == 0
    assert "Resuming after step" in "".join(capsys.readouterr())
    assert runs.adapter(parts) == runs.adapter(whole)
