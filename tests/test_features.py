"""Features: the same numbers as without, kept whole or not at all, found by content, bounded on the disk."""

import fcntl
import json
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
from runs import command, compiled, home, read  # noqa: F401

from jaxtune import data, models
from jaxtune.cli import main
from jaxtune.data import Rows
from jaxtune.data.label_rows import LabelAssembler
from jaxtune.errors import Interrupted, RunFailed, UserError
from jaxtune.methods.table import cut, tune
from jaxtune.models.classifier import SEQUENCE, TOKEN, Labels, with_labels
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.objectives.classification import classification
from jaxtune.train import features
from jaxtune.train.features import GIB, Cut, Extractor, FileLayout, Store, above, find_cut
from jaxtune.train.parallel import make_mesh
from jaxtune.train.step import value_and_grad
from jaxtune.tree import combine, partition

BERT = {
    "model_type": "bert",
    "vocab_size": small.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
TOP = {"r": 2, "layers_to_transform": (2,), "lora_dropout": 0.5, "target_modules": ("q_proj", "down_proj")}


def make_rows(n=11, seed=0, target=None, marks=1):
    """Rows of 3 to 12 random tokens, of one source."""
    rng = np.random.default_rng(seed)
    length = rng.integers(3, 13, n).astype(np.int32)
    total = int(length.sum())
    return Rows(
        tokens=rng.integers(0, small.VOCAB, total).astype(np.int32),
        mask=rng.integers(0, marks + 1, total).astype("u1" if marks == 1 else "<i4"),
        start=np.cumsum(length) - length.astype(np.int64),
        length=length,
        origin=np.arange(n, dtype=np.int64),
        source=np.zeros(n, np.int32),
        digest=np.arange(n, dtype=np.uint64),
        labels=("row {}",),
        target=target,
    )


def tuned(module, method, settings):
    """(the module split where the method wants it, its partition, its mask), b moved off zero."""
    module = cut(method, module, settings)
    params, mask = tune(method, jax.jit(module.init_params)(jax.random.key(0)), jax.random.key(1), module, settings)

    def move(path, x):
        is_b = path[-1] == jax.tree_util.GetAttrKey("b")
        return jnp.asarray(0.3 * np.random.default_rng(x.size).standard_normal(x.shape), jnp.float32) if is_b else x

    return module, partition(jax.tree_util.tree_map_with_path(move, params), mask), mask


def encoder(kind, **changes):
    names = ("O", "B-x", "I-x") if kind == TOKEN else ("a", "b", "c")
    return with_labels(models.build(BERT | changes), Labels(kind, names, drawn=True))


def decoder():
    return small.decoder(num_hidden_layers=3)


# --- where the cut lies


@pytest.mark.parametrize(
    ("make", "method", "settings", "want"),
    [
        (decoder, "head", {}, Cut(1, 3)),
        (decoder, "last_n", {"layers": 1}, Cut(1, 2)),
        (decoder, "last_n", {"layers": 3}, None),
        (decoder, "lora", TOP, Cut(1, 2)),
        (decoder, "lora", TOP | {"layers_to_transform": (1,)}, Cut(1, 1)),
        (decoder, "lora", {"target_modules": r"model\.layers\.2\..*q_proj"}, Cut(1, 2)),
        (decoder, "ia3", {"target_modules": r"model\.layers\.[12]\..*k_proj"}, Cut(1, 1)),
        (decoder, "lora", {}, None),
        (decoder, "lora", TOP | {"trainable_token_indices": (3,)}, None),
        (decoder, "lora", TOP | {"modules_to_save": ("embed_tokens",)}, None),
        (decoder, "lora", TOP | {"modules_to_save": ("lm_head",)}, Cut(1, 2)),
        (decoder, "regex", {"pattern": r"model\.norm\.weight"}, Cut(1, 3)),
        (decoder, "full", {}, None),
        (decoder, "norms", {}, None),
        (decoder, "embeddings", {}, None),
        (decoder, "prompt_tuning", {"num_virtual_tokens": 2}, None),
        (lambda: encoder(SEQUENCE), "head", {}, Cut(1, 3, pooled=True)),
        (lambda: encoder(TOKEN), "head", {}, Cut(1, 3)),
        (lambda: encoder(SEQUENCE), "last_n", {"layers": 2}, Cut(1, 1)),
        (lambda: encoder(SEQUENCE), "lora", {"layers_to_transform": (2,)}, Cut(1, 2)),
        (lambda: encoder(SEQUENCE), "bitfit", {}, None),
        (lambda: with_labels(decoder(), Labels(SEQUENCE, ("a", "b"))), "head", {}, Cut(1, 3, pooled=True)),
    ],
)
def test_the_cut_is_the_lowest_trained_layer_whatever_the_method(make, method, settings, want):
    module = cut(method, make(), settings)
    masks = []
    key = jax.random.key(0)
    jax.eval_shape(lambda p: masks.append(tune(method, p, key, module, settings)[1]), module.abstract_params())
    assert find_cut(module, masks[0]) == want


# --- the same numbers


TOP_OF_BERT = TOP | {"target_modules": ("query", "dense")}
CASES = [(decoder, "lora", TOP, True), (lambda: encoder(SEQUENCE), "head", {}, False)]
MORE = [
    *((decoder, method, settings, packing) for method, settings in (("head", {}), ("last_n", {"layers": 1}))
      for packing in (False, True)),
    (decoder, "lora", TOP, False),
    (lambda: encoder(SEQUENCE), "last_n", {"layers": 1}, False),
    *((lambda: encoder(SEQUENCE), "lora", TOP_OF_BERT, packing) for packing in (False, True)),
    (lambda: encoder(TOKEN), "head", {}, False),
    (lambda: encoder(SEQUENCE, model_type="roberta", pad_token_id=0), "last_n", {"layers": 2}, False),
]  # fmt: skip
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("make", "method", "settings", "packing"), CASES)
def test_losses_and_gradients_are_those_without(make, method, settings, packing, tmp_path):
    module, parts, mask = tuned(make(), method, settings)
    labelled = hasattr(module, "labels")
    kind = module.labels.kind if labelled else None
    target = np.random.default_rng(3).integers(0, 3, (11, 1)).astype(np.float32) if kind == SEQUENCE else None
    rows = make_rows(target=target if kind != TOKEN else np.zeros((11, 0), np.float32), marks=3 if kind == TOKEN else 1)
    second = make_rows(
        5, seed=1, target=None if rows.target is None else rows.target[:5], marks=3 if kind == TOKEN else 1
    )
    stream = data.Batches(
        [rows, second],
        batch_size=4,
        grad_accum=2,
        max_length=24,
        packing=packing,
        **({"assembler": LabelAssembler} if labelled else {}),
    )
    extractor = Extractor(module, find_cut(module, mask), combine(*parts), Store(GIB, tmp_path), make_mesh())
    cached = data.with_features(stream, extractor.open([rows, second]))
    make_loss = classification if labelled else lambda m: causal_lm(m, packed=packing)
    plain = jax.jit(value_and_grad(make_loss(module)))
    over = jax.jit(value_and_grad(make_loss(above(module, extractor.cut))))
    key = jax.random.key(5)
    for step in (0, 3):  # of the second epoch, too
        a, b = stream.batch(step), cached.batch(step)
        assert "tokens" not in b and b["row"].tolist() == a["row"].tolist()
        want, got = plain(*parts, a, key), over(*parts, b, key)
        assert float(got[0]) == pytest.approx(float(want[0]), rel=2e-5) and float(got[1]) == float(want[1]) > 0
        assert small.apart(got[2], want[2]) < 2e-5


def test_frozen_weights_below_the_cut_are_all_that_decides(tmp_path):
    module, parts, mask = tuned(decoder(), "last_n", {"layers": 1})
    rows, params = make_rows(), combine(*parts)
    where = find_cut(module, mask)

    def key(module=module, params=params, rows=rows):
        return Extractor(module, where, params, Store(GIB, tmp_path), make_mesh()).key([rows])

    above_it = {**params, "segment_1": jax.tree.map(lambda x: x + 1, params["segment_1"])}
    assert key() == key(params=above_it)
    below_it = {**params, "segment_0": jax.tree.map(lambda x: x.at[..., 0].add(1e-6), params["segment_0"])}
    others = [key(params=below_it), key(rows=make_rows(seed=1)), key(module=module.clone(dtype=jnp.bfloat16))]
    others += [
        key(rows=make_rows(10)),
        key(params={**params, "embed_tokens": {"embedding": params["embed_tokens"]["embedding"] * 2}}),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_bfloat16_features_keep_their_type(tmp_path):
    module, parts, mask = tuned(small.decoder(num_hidden_layers=3, dtype=jnp.bfloat16), "head", {})
    extractor = Extractor(module, find_cut(module, mask), combine(*parts), Store(GIB, tmp_path), make_mesh())
    found = extractor.open([make_rows()])
    assert found[3].dtype == jnp.bfloat16 and found.lay([[3, 1]], 2, 32).dtype == jnp.bfloat16


# --- the store


LAYOUT = FileLayout.of(np.array([2, 5, 3]), 4, np.float32, True)


def fill(file, first, done, broken=lambda place: False, passes=None):
    for place in range(first, 3):
        if broken(place):
            raise OSError("killed")
        if passes is not None:
            passes.append(place)
        row = LAYOUT.order[place]
        file.write(np.full((LAYOUT.length[row], 4), row + 1, np.float32).tobytes())
        done(place + 1)


def test_a_file_holds_rows_longest_first_and_reads_them_by_number(tmp_path):
    found = Store(GIB, tmp_path).open("k", LAYOUT, fill)
    assert LAYOUT.order.tolist() == [1, 2, 0] and (tmp_path / "k" / "features.bin").stat().st_size == 10 * 4 * 4
    assert [len(found[i]) for i in range(3)] == [2, 5, 3]
    assert found.lay([[0, 2], [1]], 3, 6)[..., 0].tolist() == [[1, 1, 3, 3, 3, 0], [2] * 5 + [0], [0] * 6]


def test_a_build_that_was_killed_is_never_found_and_goes_on_to_the_same_bytes(tmp_path):
    whole = Store(GIB, tmp_path / "a")
    whole.open("k", LAYOUT, fill)
    store, passes = Store(GIB, tmp_path / "b"), []
    with pytest.raises(OSError, match="killed"):
        store.open("k", LAYOUT, lambda *a: fill(*a, broken=lambda place: place == 2, passes=passes))
    assert not store.has("k", LAYOUT.nbytes) and not store.path("k").exists()
    store.open("k", LAYOUT, lambda *a: fill(*a, passes=passes))
    assert passes == [0, 1, 2]
    store.open("k", LAYOUT, None)  # found
    assert (store.path("k") / "features.bin").read_bytes() == (whole.path("k") / "features.bin").read_bytes()


def test_the_oldest_set_that_nobody_uses_makes_room(tmp_path):
    size = LAYOUT.nbytes
    store = Store(2 * size, tmp_path)
    held = {key: store.open(key, LAYOUT, fill) for key in ("old", "new")}
    os.utime(store.path("old"), (0, 0))
    assert " that other runs use" in store.why_not({"third": size})
    with pytest.raises(UserError, match="No room for features"):
        store.open("third", LAYOUT, fill)
    held.clear()  # nobody reads them any more
    assert store.why_not({"third": size}) is None
    store.open("third", LAYOUT, fill)
    assert [store.has(key, size) for key in ("old", "new", "third")] == [False, True, True]
    assert "and train.cache_gib is" in Store(size - 1, tmp_path).why_not({"third": size})


def test_a_set_that_another_process_computes_is_waited_for(tmp_path):
    store = Store(GIB, tmp_path)
    with (tmp_path / "k.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        asked = []
        with pytest.raises(Interrupted):
            store.open("k", LAYOUT, fill, lambda: asked.append(1) or len(asked) > 2)
    assert store.open("k", LAYOUT, fill)[1].shape == (5, 4)


def test_a_full_disk_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, features.ROOM + 1))
    assert "the disk of" in Store(GIB, tmp_path).why_not({"k": 100})
    with pytest.raises(UserError, match="No room for features"):
        Store(GIB, tmp_path).open("k", LAYOUT, fill)


def damage(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a bit": lambda folder: damage(folder / "features.bin"),
    "cut short": lambda folder: os.truncate(folder / "features.bin", 7),
    "checksums": lambda folder: damage(folder / "checksums.json", 4),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "no features": lambda folder: (folder / "features.bin").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_features_are_made_again_and_it_is_said_once(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 48)
    store, said = Store(GIB, tmp_path), []
    store.open("k", LAYOUT, fill, say=said.append)
    whole = {p.name: p.read_bytes() for p in store.path("k").iterdir()}
    assert len(json.loads(whole["checksums.json"])) == 4
    features._verified.clear()  # as in another process
    DAMAGES[kind](store.path("k"))
    found = store.open("k", LAYOUT, fill, say=said.append)
    assert [len(found[i]) for i in range(3)] == [2, 5, 3] and found[0].tolist() == [[1] * 4] * 2
    assert {p.name: p.read_bytes() for p in store.path("k").iterdir()} == whole
    assert len(said) == 1 and "were damaged" in said[0]
    del found
    store.open("k", LAYOUT, None, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["features", "progress"])
def test_a_build_that_was_damaged_while_it_rested_is_begun_anew(kind, tmp_path):
    store, said, passes = Store(GIB, tmp_path), [], []
    with pytest.raises(OSError, match="killed"):
        store.open("k", LAYOUT, lambda *a: fill(*a, broken=lambda place: place == 2))
    damage(store.partial("k") / ("features.bin" if kind == "features" else "progress.json"), 3)
    found = store.open("k", LAYOUT, lambda *a: fill(*a, passes=passes), say=said.append)
    assert passes == [0, 1, 2] and found[1].tolist() == [[2] * 4] * 5
    assert len(said) == 1 and "were damaged and are recomputed" in said[0]


def test_damaged_features_that_another_run_uses_are_said(tmp_path):
    store = Store(GIB, tmp_path)
    used = store.open("k", LAYOUT, fill)
    features._verified.clear()
    damage(store.path("k") / "features.bin")
    with pytest.raises(UserError, match="are damaged, and another run uses them"):
        Store(GIB, tmp_path).open("k", LAYOUT, fill)
    assert used is not None


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_damaged_after_it_was_opened_is_found_as_it_is_read(dtype, tmp_path):
    """Also where a second opening in this process believes what the first has verified."""
    layout = FileLayout.of(np.array([2, 5, 3]), 4, dtype, True)

    def filled(file, first, done):
        file.write(np.arange(40).astype(dtype).tobytes())

    store, plan = Store(GIB, tmp_path), [[0, 2], [1]]
    found = store.open("k", layout, filled)
    whole = found.lay(plan, 2, 8)
    assert whole[1, :5].tolist() == np.arange(20).reshape(5, 4).tolist()  # the longest row comes first
    file = store.path("k") / "features.bin"
    times = file.stat()
    with file.open("r+b") as f:
        f.seek(5)
        f.write(b"\x01")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for reader in (found, store.open("k", layout, None)):
        assert (reader.lay([[0, 2]], 1, 8) == whole[:1]).all()
        with pytest.raises(RunFailed, match=r"have been damaged since this run opened them \(row 2\)"):
            reader.lay(plan, 2, 8)
    del found, reader
    features._verified.clear()  # as in another process
    said = []
    assert (store.open("k", layout, filled, say=said.append).lay(plan, 2, 8) == whole).all()
    assert len(said) == 1 and "were damaged and are recomputed" in said[0]


def test_a_store_of_another_user_is_read_and_not_written(tmp_path, monkeypatch):
    """What is there is used, also where neither the folder nor the lock can be written."""
    store = Store(GIB, tmp_path)
    store.open("k", LAYOUT, fill)
    features._verified.clear()
    real = os.open

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    def read_only(path, flags, *more, **kwargs):
        return refuse() if flags & os.O_RDWR else real(path, flags, *more, **kwargs)

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "access", lambda path, how, **_: not how & os.W_OK)
    assert store.why_not({"k": LAYOUT.nbytes}) is None
    assert store.open("k", LAYOUT, None)[1].shape == (5, 4)
    assert "cannot be written; set JAXTUNE_CACHE" in store.why_not({"other": 10})


# --- whole runs


HEAD = {"tune__method": "head", "tune__lora__r": None, "tune__lora__lora_dropout": None, "optim__lr": 0.05}


@pytest.fixture
def run(home, tmp_path, capsys, monkeypatch):  # noqa: F811
    """`run(name, **settings) -> (status, output)`; features are kept in a folder of the test."""
    monkeypatch.setattr("jaxtune.train.features.cache_root", lambda: tmp_path / "cache")

    def call(name, *flags, **settings):
        capsys.readouterr()
        status = main(command(home, tmp_path / name, *flags, **{**HEAD, **settings}))
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def close(a, b):
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        assert all(one[k] == pytest.approx(other[k], rel=1e-4) for k in one), (one, other)


def test_a_run_by_itself_caches_what_pays_and_learns_the_same(run, tmp_path):
    status, said = run("cached", data__packing="true", train__grad_accum=2)
    assert (
        status == 0 and "features: ready" in said and "(the first 2 layers; " in said and "are computed once" in said
    ), said
    status, said = run("plain", data__packing="true", train__grad_accum=2, train__cache_features="off")
    assert status == 0 and "eatures" not in re.sub(r"features \d+\.\d", "", said)
    close(read(tmp_path / "cached"), read(tmp_path / "plain"))
    assert read(tmp_path / "cached")[-1]["eval/loss"] < read(tmp_path / "cached")[0]["eval/loss"]
    status, said = run("short", train__steps=2, train__eval_every=0, data__eval=None)
    assert status == 0 and "eatures" not in re.sub(r"features \d+\.\d", "", said)  # it would not pay


def test_a_run_stopped_anywhere_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
    def signalled(method, call):
        """Send SIGTERM in the given call of a method."""
        real, calls = getattr(*method), []

        def counted(*args):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        patch = pytest.MonkeyPatch()
        patch.setattr(*method, counted)
        return patch

    monkeypatch.setattr(features, "TOKENS", 64)  # of 600: ten forward passes
    assert run("alone")[0] == 0
    shutil.rmtree(tmp_path / "cache")
    with signalled((Extractor, "_pass"), 4).context():
        status, said = run("stopped")
    assert (
        status == 3 and "the features so far are kept" in said and not (tmp_path / "stopped" / "metrics.jsonl").exists()
    )
    [progress] = (tmp_path / "cache").glob("features/.*.partial/progress.json")
    assert 0 < json.loads(progress.read_text())["places"] < 40
    with signalled((features.Features, "lay"), 9).context():  # two of them are evaluations
        status, said = run("stopped")
    assert status == 3 and "the checkpoint is saved" in said
    status, said = run("stopped")
    assert status == 0 and "are found in" in said
    model = "model/model.safetensors"
    assert (tmp_path / "stopped" / model).read_bytes() == (tmp_path / "alone" / model).read_bytes()
    assert read(tmp_path / "stopped") == read(tmp_path / "alone")


@pytest.mark.slow
def test_members_of_a_sweep_share_the_features(run, home, tmp_path):  # noqa: F811
    def sweep(name, **settings):
        flags = command(home, tmp_path / name, **{**HEAD, "optim__lr": None, "train__steps": 6, **settings})[1:]
        return main(["sweep", *flags, "--sweep.optim.lr=0.01,0.05", "--sweep.train.seed=0,1"])

    assert sweep("cached", train__cache_features="on") == 0 and sweep("plain", train__cache_features="off") == 0
    names = [p.name for p in (tmp_path / "cached").glob("lr=*")]
    assert len(names) == 4 and len(list((tmp_path / "cache" / "features").glob("*/features.bin"))) == 2
    for name in names:
        close(read(tmp_path / "cached" / name), read(tmp_path / "plain" / name))


def test_what_cannot_be_is_said_before_the_first_compile(run):
    status, said = run("a", tune__method="full", train__cache_features="on")
    assert status == 2 and "trains something in or below the first block" in said
    status, said = run("b", train__cache_features="on", train__cache_gib=1e-6)
    assert status == 2 and "and train.cache_gib is 9.99e-07" in said
    status, said = run("c", train__cache_features="off", train__cache_gib=3)
    assert status == 2 and "train.cache_gib has no effect: train.cache_features is off" in said
    status, said = run("d", "--dry-run", train__cache_gib=1e-6)
    assert status == 0 and "Features are not cached: they take " in said
    status, said = run("e", "--dry-run")
    assert status == 0 and "are computed once and kept in" in said and "features: ready" not in said


@pytest.mark.slow
def test_a_run_goes_on_as_it_began(run, tmp_path):
    assert run("with")[0] == 0
    status, said = run("with", train__steps=16, train__cache_gib=1e-6)
    assert status == 2 and "began with cached features, which it would not use now" in said
    assert run("with", train__steps=16, train__cache_features="off")[0] == 0
    assert run("without", train__steps=1, data__eval=None, train__eval_every=0)[0] == 0
    status, said = run("without", train__steps=30, data__eval=None, train__eval_every=0)
    assert status == 0 and "features: ready" not in said


def test_operations_of_a_run_are_those_above_the_features(run, tmp_path):
    def flops(name):
        return json.loads((tmp_path / name / "summary.json").read_text())["cost"]["flops"]

    assert run("cached")[0] == run("plain", train__cache_features="off")[0] == 0
    # Head and its gradients by input and weight, f32[16, 258] each, at every position that a batch has.
    assert 0 < flops("cached") < 0.75 * flops("plain")
