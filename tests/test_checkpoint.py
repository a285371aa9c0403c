"""Checkpoints by orbax: what comes back, what is kept, what happens to damaged ones."""

import json
import logging
import resource
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxtune.errors import UserError, disk_trouble
from jaxtune.train import checkpoint
from jaxtune.train.checkpoint import Checkpoints, Damaged, check_disk, state_bytes
from jaxtune.train.optim import optimizer
from jaxtune.train.step import TrainState, init_state
from jaxtune.tree import MEMBER, TRAIN, partition
from jaxtune.weights.adapters import LoraWeight


def state(seed=0.0) -> TrainState:
    """A state with holes, a polymorphic leaf, bfloat16 and integers."""
    weight = LoraWeight(jnp.ones((2, 4, 4)), jnp.full((2, 4, 1), float(seed)), jnp.ones((2, 1, 4)), jnp.ones(2))
    params = {"proj": {"kernel": weight, "bias": jnp.full(3, seed, jnp.bfloat16)}}
    mask = {"proj": {"kernel": LoraWeight(None, TRAIN, TRAIN, MEMBER), "bias": TRAIN}}
    mask["proj"]["kernel"].w = MEMBER
    part = partition(params, mask)
    return init_state(part.trainable, part.member, optimizer("adamw", lr=0.1), jax.random.key(7))


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    manager = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    yield manager
    manager.close()


def counters(best=None, **more):
    run = {"best": None if best is None else {"step": best, "loss": 0.1 + 0.2}, "waited": 0, **more}
    return {"runs": [run]}


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got._replace(key=jax.random.key_data(got.key))),
                    jax.tree.leaves(want._replace(key=jax.random.key_data(want.key)))):  # fmt: skip
        assert g.dtype == w.dtype
        assert np.array_equal(g, w)


def test_all_comes_back(checkpoints):
    window = {"loss": 1 / 3, "weight": 7.0, "tokens": 3}
    checkpoints.save(5, state(3.0), counters(best=5, window=window))
    checkpoints.wait()
    found, kept = checkpoints.restore(lambda _: state())
    assert_equal(found, state(3.0))
    assert kept == counters(best=5, window=window)
    assert jax.random.uniform(found.key) == jax.random.uniform(state().key)


def test_nothing_to_restore(checkpoints):
    assert checkpoints.restore(lambda _: state()) is None


def test_the_names_in_a_checkpoint_need_no_code_to_be_read(checkpoints):
    checkpoints.save(1, state(2.0), counters())
    checkpoints.wait()
    with ocp.StandardCheckpointer() as reader:
        found = reader.restore(checkpoints.folder / "1" / "state")
    assert set(found) >= {"step", "key", "trainable/proj/kernel/a", "trainable/proj/bias", "member/proj/kernel/scale"}
    assert not any(name.startswith("frozen") for name in found)
    assert np.array_equal(found["trainable/proj/kernel/a"], np.full((2, 4, 1), 2.0))
    assert json.loads((checkpoints.folder / "1" / "counters" / "metadata").read_text()) == counters()


def on_disk(checkpoints):
    return sorted(int(p.name) for p in checkpoints.folder.iterdir() if p.name.isdigit())


def test_the_newest_are_kept_and_the_best(checkpoints):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6)):
        checkpoints.save(step, state(step), counters(best))
        checkpoints.wait()
    assert on_disk(checkpoints) == [6, 7]
    checkpoints.save(8, state(8), counters(6))
    checkpoints.save(9, state(9), counters(6))
    checkpoints.wait()
    assert on_disk(checkpoints) == [6, 8, 9]
    assert_equal(checkpoints.restore(lambda _: state(), step=6)[0], state(6))


def test_the_best_stays_until_a_better_one_is_complete(checkpoints):
    """Killed while 3 is written, the run goes on from 2, whose counters name 1."""
    checkpoints.keep = 1
    checkpoints.save(1, state(1), counters(1))
    checkpoints.save(2, state(2), counters(1))
    seen = []
    real = checkpoints.manager.save
    checkpoints.manager.save = lambda *a, **k: seen.append(on_disk(checkpoints)) or real(*a, **k)
    checkpoints.save(3, state(3), counters(3))
    checkpoints.wait()
    assert seen == [[1, 2]]
    assert on_disk(checkpoints) == [3]


def test_a_run_that_goes_on_keeps_the_best_of_the_one_before(checkpoints, tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), counters(1))
    checkpoints.wait()
    again = Checkpoints(tmp_path / "checkpoints", keep=1)
    found, kept = again.restore(lambda _: state())
    assert (kept["runs"][0]["best"]["step"], on_disk(again)) == (1, [1, 2, 3])
    again.save(4, found, kept)
    again.close()
    assert on_disk(again) == [1, 4]


def test_a_step_is_saved_once(checkpoints):
    checkpoints.save(1, state(1), counters())
    checkpoints.save(1, state(2), counters())
    checkpoints.wait()
    assert_equal(checkpoints.restore(lambda _: state())[0], state(1))


def halve(folder):
    """Cut the largest file of arrays in two."""
    file = max((folder / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


DAMAGES = {
    "arrays cut short": halve,
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "counters cut short": lambda folder: (folder / "counters" / "metadata").write_text('{"best":'),
    "no counters": lambda folder: shutil.rmtree(folder / "counters"),
    "empty": lambda folder: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, checkpoints, tmp_path, said):
    for step in (3, 6):
        checkpoints.save(step, state(step), counters())
    checkpoints.close()
    DAMAGES[damage](checkpoints.folder / "6")
    again = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    found, _ = again.restore(lambda _: state())
    assert_equal(found, state(3))
    assert len(said) == 1
    assert "checkpoint of step 6 cannot be read" in said[0]
    assert "using the one before" in said[0]
    again.save(6, state(60), counters())
    again.wait()
    assert_equal(again.restore(lambda _: state())[0], state(60))
    again.close()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_whatever_is_damaged_no_wrong_number_comes_back(damage, checkpoints, said):
    """Whichever file it is; and without a word from reads that go on behind an error."""
    for step in (3, 6):
        checkpoints.save(step, state(step), counters())
    checkpoints.wait()
    kept, now, found = checkpoints.folder / "6", checkpoints.folder.parent / "whole", []
    shutil.copytree(kept, now)
    for file in [p.relative_to(now) for p in now.rglob("*") if p.is_file()]:
        data = (kept / file).read_bytes()
        half = len(data) // 2
        (kept / file).write_bytes(data[:half] if damage == "cut" else data[:half] + b"\xff" + data[half + 1 :])
        got, _ = checkpoints.restore(lambda _: state())
        found.append(int(got.trainable["proj"]["bias"][0]))
        assert_equal(got, state(found[-1]))
        shutil.rmtree(checkpoints.folder / "damaged-6", ignore_errors=True)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(now, kept)
        checkpoints.manager.reload()
    assert set(found) == {3, 6}
    assert len(said) == found.count(3)


def flip(file, at, bit=0):
    """Flip a bit of a file in place."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def noise(seed):
    """A state of numbers that do not compress."""
    array = jax.random.normal(jax.random.key(seed), (64, 128))
    return state()._replace(trainable={"bias": jnp.full(3, seed), "noise": array})


def test_a_flipped_bit_of_an_array_is_found_wherever_it_is(checkpoints, said):
    for step in (3, 6):
        checkpoints.save(step, noise(step), counters())
    checkpoints.wait()
    kept, whole, found = checkpoints.folder / "6", checkpoints.folder.parent / "whole", []
    shutil.copytree(kept, whole)
    file = max((p for p in kept.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    size = file.stat().st_size
    assert size > 4 * 64 * 128 * 0.9
    for number, at in enumerate(range(size // 40, size, size // 20)):
        flip(file, at, number % 8)
        got, _ = checkpoints.restore(lambda _: noise(0))
        found.append(int(got.trainable["bias"][0]))
        assert_equal(got, noise(found[-1]))
        shutil.rmtree(checkpoints.folder / "damaged-6", ignore_errors=True)
        shutil.copytree(whole, kept, dirs_exist_ok=True)
        checkpoints.manager.reload()
    assert found.count(3) == len(said) >= 19


@pytest.mark.parametrize("what", ["arrays", "counters", "checksums"])
def test_numbers_that_changed_without_damage_to_the_format_are_found(what, checkpoints, said):
    """As a flipped bit in an array that is stored as it is, or a digit of a counter."""
    for step in (3, 6):
        checkpoints.save(step, state(step), counters(best=3))
    checkpoints.wait()
    folder = checkpoints.folder / "6"
    if what == "arrays":
        shutil.rmtree(folder / "state")
        shutil.copytree(checkpoints.folder / "3" / "state", folder / "state")
    else:
        file = folder / what / "metadata"
        text = file.read_text()
        file.write_text(text.replace("0.30000000000000004", "0.20000000000000004") if what == "counters" else
                        text.replace("trainable/proj/bias", "trainable/proj/biac"))  # fmt: skip
        assert file.read_text() != text
    assert_equal(checkpoints.restore(lambda _: state())[0], state(3))
    assert "checkpoint of step 6 cannot be read" in said[0]


def test_damaged_a_second_time_at_the_same_step(checkpoints, said):
    checkpoints.save(3, state(3), counters())
    for _ in range(3):
        checkpoints.save(6, state(6), counters())
        checkpoints.wait()
        halve(checkpoints.folder / "6")
        assert_equal(checkpoints.restore(lambda _: state())[0], state(3))
    names = sorted(p.name for p in checkpoints.folder.iterdir())
    assert names == ["3", "damaged-6", "damaged-6-2", "damaged-6-3"]
    assert "set aside as damaged-6-3" in said[-1]


def test_a_damaged_checkpoint_that_was_asked_for_is_one_sentence(checkpoints):
    for step in (3, 6):
        checkpoints.save(step, state(step), counters())
    checkpoints.wait()
    halve(checkpoints.folder / "3")
    with pytest.raises(Damaged, match="checkpoint of step 3 cannot be read"):
        checkpoints.restore(lambda _: state(), step=3)
    assert on_disk(checkpoints) == [6]


def test_checkpoints_written_before_there_were_checksums_are_read_and_it_is_said_once(checkpoints, said):
    for step in (3, 6):
        checkpoints.save(step, state(step), counters())
        checkpoints.wait()
        shutil.rmtree(checkpoints.folder / str(step) / "checksums")
    for _ in range(2):
        assert_equal(checkpoints.restore(lambda _: state())[0], state(6))
    assert said == ["The checkpoints here were written without checksums, so they cannot be verified."]


def test_of_a_checkpoint_without_checksums_numbers_that_are_not_finite_are_damage(checkpoints, said):
    for step in (3, 6):
        checkpoints.save(step, state(step if step == 3 else float("nan")), counters())
        checkpoints.wait()
        shutil.rmtree(checkpoints.folder / str(step) / "checksums")
    assert_equal(checkpoints.restore(lambda _: state())[0], state(3))
    assert "holds numbers that are not finite" in said[1]


def test_a_whole_checkpoint_of_another_run_is_not_taken_for_a_damaged_one(checkpoints):
    checkpoints.save(3, state(3), counters())
    checkpoints.wait()
    other = state()._replace(trainable={"other": jnp.zeros(3)})
    wider = state()._replace(step=jnp.zeros(2, jnp.int32))
    for unlike, said in (
        (other, r"only one of them has .*trainable/proj"),
        (wider, r"step is int32\(\) there and int32\(2,\)"),
    ):
        with pytest.raises(UserError, match=rf"is whole, and of another model.*{said}"):
            checkpoints.restore(lambda _, unlike=unlike: unlike)
    assert on_disk(checkpoints) == [3]


def test_all_checkpoints_damaged(checkpoints, tmp_path, said):
    for step in (3, 6):
        checkpoints.save(step, state(step), counters())
    checkpoints.close()
    for step in (3, 6):
        halve(checkpoints.folder / str(step))
    again = Checkpoints(tmp_path / "checkpoints", keep=2, say=said.append)
    assert again.restore(lambda _: state()) is None
    assert len(said) == 2
    again.close()


def test_what_a_kill_left_half_written_is_not_found(checkpoints, tmp_path):
    checkpoints.save(3, state(3), counters())
    checkpoints.close()
    shutil.copytree(checkpoints.folder / "3", checkpoints.folder / "6.orbax-checkpoint-tmp-0")
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert again.steps() == [3]
    again.close()
    assert [p.name for p in checkpoints.folder.iterdir()] == ["3"]


def test_a_best_whose_checkpoint_is_gone_is_forgotten(checkpoints, tmp_path):
    checkpoints.save(2, state(2), counters(1))
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert again.restore(lambda _: state())[1]["runs"][0]["best"] is None
    again.close()


def test_a_write_that_fails_is_raised_and_not_logged_by_orbax(checkpoints, monkeypatch, caplog, capfd):
    from orbax.checkpoint._src.serialization import serialization

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(serialization.ts, "open", full)
        checkpoints.save(3, state(), counters())
        with pytest.raises(Exception) as failed:
            checkpoints.wait()
    assert "No room is left on the disk" in disk_trouble(failed.value)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_disk_that_refuses_many_arrays_is_no_traceback(checkpoints, caplog, capfd):
    """As a full disk does, but without one: no file may grow beyond 4 KiB."""
    import gc

    keys = jax.random.split(jax.random.key(0), 40)
    arrays = {str(i): jax.random.normal(key, (64, 64)) for i, key in enumerate(keys)}
    many = init_state(arrays, {}, optimizer("adamw", lr=0.1), jax.random.key(7))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(3, 8):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            checkpoints.save(step, many, counters())
            with pytest.raises(Exception) as failed:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "File too large" in disk_trouble(failed.value)
        del failed
        gc.collect()  # tells of tasks whose errors nobody asked for
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_is_not_of_a_closed_loop_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(checkpoint, "_unraisablehook", shown.append)
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("Event loop is closed")):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(told.exc_value) for told in shown] == ["another", "Event loop is closed"]


def test_bytes_of_a_state():
    weights, moments = (8 + 8) * 4 + 3 * 2, 2 * ((8 + 8) * 4 + 3 * 2)
    members, small = (2 * 4 * 4 + 2) * 4, 64
    assert weights + moments + members < state_bytes(state()) < weights + moments + members + small


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40, 2**30))
    check_disk(tmp_path / "not" / "there", 2**30)
    with pytest.raises(UserError) as refused:
        check_disk(tmp_path / "not" / "there", 3 * 2**30)
    assert "has 1.00 GiB free; this run writes up to 3.00 GiB" in str(refused.value)
    assert "train.keep" in str(refused.value)
