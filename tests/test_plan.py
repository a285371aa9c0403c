"""`jaxtune plan`: the formula against XLA's plan, its operations against the known counts, and the command."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import command, compiled, home  # noqa: F401

from jaxtune import models
from jaxtune.cli import main
from jaxtune.methods.table import tune
from jaxtune.models import FAMILIES
from jaxtune.objectives.causal_lm import causal_lm_task
from jaxtune.objectives.task import BatchShape
from jaxtune.run import fit
from jaxtune.train import cost as plan
from jaxtune.train import liveness, optim
from jaxtune.train.recipe import Recipe, compiled_bytes

TOLERANCE = 0.15  # of the formula against XLA's plan on a CPU


def config(width, mlp, layers, heads, kv, vocab):
    return small.CONFIG | {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 2048,
    }


TINY, MID = config(64, 128, 4, 4, 2, 256), config(512, 1408, 8, 8, 4, 32000)


def recipe(hf, method="lora", rows=4, length=64, tx="adamw", **fields):
    module = models.build(hf, **fields)
    settings = {"r": 8} if method == "lora" else {}
    optimizer = functools.partial(optim.optimizer, tx, lr=1e-3, grad_clip=1.0)
    tuned = functools.partial(tune, method, settings=settings)
    return Recipe(module, causal_lm_task(module), tuned, optimizer, BatchShape(rows, length))


def assert_as_xla(s):
    formula, xla = plan.measure(s, "cpu").bytes(s.batch.rows).total, compiled_bytes([s], alone=True)
    assert abs(formula / xla - 1) < TOLERANCE, (formula / 2**20, xla / 2**20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hf, method, length, remat",
    [
        (TINY, "lora", 64, "none"),
        (MID, "lora", 512, "none"),
        (MID, "lora", 512, "full"),
        (MID, "full", 512, "none"),
        (MID, "head", 512, "none"),
    ],
    ids=["tiny-lora", "mid-lora", "mid-lora-remat", "mid-full", "mid-head"],
)
def test_the_formula_is_near_xlas_plan(hf, method, length, remat):
    assert_as_xla(recipe(hf, method, length=length, remat=remat))


@functools.cache
def cost(method="lora", layers=4):
    """On a GPU in bfloat16, keeping everything."""
    hf = TINY | {"num_hidden_layers": layers}
    return plan.measure(recipe(hf, method, dtype=jnp.bfloat16), "gpu")


def test_fixed_parts_are_exact():
    n = sum(x.size for x in jax.tree.leaves(models.build(TINY).abstract_params()))
    full = cost("full").bytes(4)
    assert (full.frozen, full.trainable, full.gradients) == (0, 4 * n, 4 * n)
    assert 8 * n <= full.optimizer <= 8 * n + 64  # two moments; a counter and the hyperparameters
    lora, counts = cost().bytes(1), cost().counts
    assert (counts.all - counts.trainable, lora.frozen) == (n, 2 * n)
    assert lora.gradients == 4 * counts.trainable


def test_operations_a_token_are_6n_and_4n():
    """Kaplan et al. 2020 (arXiv:2001.08361): 2 N forward, 4 N backward; LoRA needs no gradient of its frozen N."""
    hf = config(256, 1024, 4, 4, 4, 4096)

    def flops(method, remat):
        s = recipe(hf, method, 1, 64, remat=remat)
        return plan._flops(s, "cpu", s.abstract) / 64

    matrices = sum(x.size for x in jax.tree.leaves(models.build(hf).abstract_params()) if len(x.shape) >= 2)
    assert 6.0 < flops("full", "none") / matrices < 6.4  # tied, so the head is counted; attention's own come on top
    assert 4.0 < flops("lora", "none") / matrices < 4.6
    assert 1.15 < flops("lora", "full") / flops("lora", "none") < 1.5


def test_depth_and_policies_change_what_they_should():
    thin, deep = cost(), cost(layers=8)
    assert 1.9 < deep.kept[1] / thin.kept[1] < 2.1
    assert deep.layer[1] == pytest.approx(thin.layer[1], rel=0.1)
    policies = plan.by_policy(thin.recipe, "gpu")
    kept = [cost.kept[1] for cost in policies.values()]
    assert kept == sorted(kept, reverse=True) and kept[0] == thin.kept[1]
    inputs = 4 * 64 * 64 * 2  # what "full" keeps: the input of each of four layers, 64 tokens of width 64 in bfloat16
    assert inputs < policies["full"].kept[1] < 3 * inputs
    # Offloaded are these and attention's outputs, as wide as they are, with two numbers for each of four heads.
    assert 2 * inputs <= policies["offload"].host[1] <= 2 * inputs + 4 * 64 * 4 * 2 * 4
    assert all(cost.host == (0, 0) for name, cost in policies.items() if name != "offload")


@given(st.integers(0, 5000), st.integers(1, 10000))
def test_most(n, limit):
    assert plan._most(lambda k: k <= n, limit) == min(n, limit)


def test_largest_is_the_last_that_fits():
    memory = plan.GIB + 200 * 2**20
    rows, members = cost().largest(memory), cost().widest(4, memory)
    for n, total in ((rows, lambda k: cost().bytes(k).total), (members, lambda k: cost().bytes(4, k).total)):
        assert n > 1 and plan.fits(total(n), memory) and not plan.fits(total(n + 1), memory)
    assert cost().largest(plan.GIB) == 0


def test_time_is_bound_by_the_slower_of_products_and_memory():
    fast, narrow = plan.Card(1e12, 1e30, plan.GIB), plan.Card(1e30, 1e9, plan.GIB)
    assert cost().seconds(4, fast) == pytest.approx(4 * cost().flops / (0.40 * 1e12))
    assert cost().seconds(4, narrow) > 3 * cost().bytes(4).frozen / 1e9


def test_operations_that_nobody_reads_are_not_counted():
    """The gradient of frozen experts is written down in the jaxpr, and dropped by XLA; a grouped product is 2 N K M."""
    x, w = jnp.zeros((6, 4)), jnp.zeros((3, 4, 5))
    sizes = jnp.array([1, 2, 3])

    def grouped(x, w):
        return jax.lax.ragged_dot(x, w, sizes)

    def unread(x, w):
        jnp.dot(x, w[0])
        return grouped(x, w)

    for fn in (grouped, unread):
        assert plan.dot_flops(jax.make_jaxpr(fn)(x, w).jaxpr) == 2 * 6 * 4 * 5


@given(st.integers(1, 96), st.integers(20, 400))
@settings(deadline=None)
def test_the_chosen_micro_batch_is_the_fastest_that_fits(rows, mib):
    policies = _measured()
    memory, card = plan.GIB + mib * 2**20, plan.Card(1e12, 1e10, 0)
    choice = plan.choose_micro_batch(policies, rows, memory, card)
    times = {
        (n, policy): c.split(rows // n).seconds(n, card)
        for policy, c in policies.items()
        for n in range(1, rows + 1)
        if rows % n == 0 and plan.fits(c.split(rows // n).bytes(n).total, memory)
    }
    assert (choice is None) == (not times)
    if choice:
        assert times[choice] == min(times.values())
        assert choice.rows == max(n for (n, _), t in times.items() if t == times[choice])


@functools.cache
def _measured():
    s = cost().recipe
    return {p: plan.measure(s.with_module(remat=p), "gpu", s.abstract) for p in ("none", "full")}


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TINY))
    return path


def planned(capsys, *argv):
    assert main(["plan", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_card_from_config_json_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr(plan, "POLICIES", ("none", "full"))
    assert (
        main(["plan", str(folder / "config.json"), "--gpu=rtx4090", "--batch=4", "--length=64", "--method=head"]) == 0
    )
    out = capsys.readouterr().out
    assert "fits rtx4090 (24.0 GiB)" in out and "head" in out and "bfloat16" in out and "by formula" in out


def test_a_config_that_does_not_fit_says_what_would(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "POLICIES", ("none", "full"))
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(dict(model=dict(path={str(folder)!r}), tune=dict(lora=dict(r=4)), "
        "data=dict(max_length=512), train=dict(batch_size=256, grad_accum=4)))\n"
    )
    lora, head = planned(capsys, file, "--method=lora,head", "--memory=1.1")
    assert (lora["method"], head["method"]) == ("lora", "head")
    assert (lora["rows"], lora["micro_batches"], lora["source"][:7]) == (64, 4, "formula")
    assert not lora["fits"] and len(lora["remedies"]) == 3
    accum = next(r for r in lora["remedies"] if r.startswith("--config.train.grad_accum"))
    rows = 256 // int(accum.partition("=")[2].split()[0])
    none = lora["policies"]["none"]
    assert rows <= none["largest_rows"] < 64 and rows * 2 > none["largest_rows"]
    assert none["tokens_a_second"] is None  # of a GPU that has no name


@pytest.mark.slow
def test_the_device_at_hand_is_planned_by_xla(folder, capsys):
    [one] = planned(capsys, folder, "--batch=4", "--length=64")
    assert one["source"] == "XLA's plan of the compiled step" and one["dtype"] == "float32"
    assert abs(one["total_bytes"] / one["policies"]["none"]["bytes"]["total"] - 1) < TOLERANCE


def test_wrong_input(folder, capsys):
    for argv, said in [
        ([], "model is missing"),
        ([folder, "--gpu=h10"], "Did you mean 'h100'"),
        ([folder, "--memory=-1"], "expected GiB above 0"),
        ([folder, "--batch=0"], "expected 1 or more"),
        ([folder, "--gpu=h100", "--method=lore"], "Did you mean 'lora'"),
        ([folder, "--gpu=h100", "--length=99999"], "exceeds the 2048 positions"),
        ([folder / "nowhere", "--gpu=h100"], "does not exist"),
    ]:
        assert main(["plan", *map(str, argv)]) == 2
        assert said in capsys.readouterr().err


def test_cards_are_listed(capsys):
    assert main(["plan", "--gpu=list"]) == 0
    assert "h200" in capsys.readouterr().out


def free(monkeypatch, mib):
    monkeypatch.setattr(plan, "WORKSPACE", 0)
    monkeypatch.setattr(fit, "free_bytes", lambda: int(mib * 2**20))


def test_a_run_takes_the_micro_batch_that_fits_and_keeps_it(home, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(plan, "POLICIES", ("none", "full"))
    auto = {"train__micro_batch": "auto", "train__batch_size": 16, "train__eval_every": 9, "train__save_every": None}
    free(monkeypatch, 1.2)
    assert main(command(home, tmp_path / "run", **auto, train__steps=1)) == 0
    out = capsys.readouterr().out
    chosen = json.loads((tmp_path / "run" / "config.json").read_text())
    rows, parts = chosen["train"]["micro_batch"], chosen["train"]["grad_accum"]
    assert 1 <= rows < 16 and rows * parts == 16
    assert f"train.micro_batch={rows} of 16 rows and model.remat={chosen['model']['remat']}:" in out
    free(monkeypatch, 4096)
    assert main(command(home, tmp_path / "run", **auto, train__steps=2)) == 0
    again = json.loads((tmp_path / "run" / "config.json").read_text())
    assert again["train"] | {"steps": 1} == chosen["train"]
    assert main(command(home, tmp_path / "large", "--dry-run", **auto)) == 0
    assert "train.micro_batch=16 of 16 rows and model.remat=none" in capsys.readouterr().out


def test_a_run_that_cannot_fit_is_refused_with_remedies(home, tmp_path, capsys, monkeypatch):  # noqa: F811
    free(monkeypatch, 0.2)
    monkeypatch.setattr(plan, "POLICIES", ("none", "full"))
    asked = {"train__micro_batch": "auto", "tune__method": "full", "tune__lora__r": None}
    assert main(command(home, tmp_path / "run", **asked, tune__lora__lora_dropout=None)) == 2
    err = capsys.readouterr().err
    assert "not even one row of" in err and "The cheapest remedies:" in err and "a larger card" in err
    assert not (tmp_path / "run").exists()
    argv = command(home, tmp_path / "sweep", "--sweep.optim.lr=1e-3,1e-2", train__micro_batch="auto", optim__lr=None)
    assert main(["sweep", *argv[1:]]) == 2
    assert "the memory of a sweep decides" in capsys.readouterr().err


@pytest.mark.parametrize(
    "hf, head",
    [
        ({"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}, 2 * 64),
        ({"architectures": ["LlamaForTokenClassification"], "pad_token_id": 0, "num_labels": 5}, 5 * 65),
    ],
)
def test_label_heads_plan(hf, head, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "POLICIES", ("none",))
    (tmp_path / "config.json").write_text(json.dumps(TINY | hf))
    [one] = planned(capsys, tmp_path, "--gpu=l4", "--batch=2", "--length=32", "--method=head")
    assert one["trainable"] == head
    assert one["policies"]["none"]["bytes"]["logits"] == 0


def test_a_quantised_base_plans_smaller(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "POLICIES", ("none",))
    file = tmp_path / "q.py"
    sizes = {}
    for kind in ("none", "nf4"):
        file.write_text(
            f"def get_config(): return {{'model': {{'path': {str(folder)!r}, 'quantization': {kind!r}}}}}\n"
        )
        [one] = planned(capsys, file, "--gpu=l4", "--batch=2", "--length=32")
        sizes[kind] = one["policies"]["none"]["bytes"]["frozen"]
        assert one["parameters"] - one["trainable"] == sum(
            x.size for x in jax.tree.leaves(models.build(TINY).abstract_params())
        )
    body = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(models.build(TINY).abstract_params())
        if "kernel" in str(path)
    )
    assert 2 * body - 0.7 * body < sizes["none"] - sizes["nf4"] < 1.5 * body  # 16 bits become about 4.5


@pytest.mark.slow
def test_real_configs_plan(assets, capsys, monkeypatch):
    monkeypatch.setattr(plan, "POLICIES", ("none", "full"))
    largest = {}  # of each family: its other sizes take the same way
    for path in (assets / "hf-configs").iterdir():
        hf = json.loads((path / "config.json").read_text())
        if (family := hf.get("model_type")) in FAMILIES:
            size = sum(x.size for x in jax.tree.leaves(models.build(hf).abstract_params()))
            largest[family] = max(largest.get(family, (0, path)), (size, path))
    for i, (size, path) in enumerate(sorted(largest.values(), reverse=True)):
        if i == 1:  # each policy and each remedy is traced: the largest of all shows that they can be
            monkeypatch.setattr(plan, "POLICIES", ("none",))
            monkeypatch.setattr(fit, "remedies", lambda *_: ())
        [one] = planned(capsys, path, "--gpu=h100", "--length=256", "--batch=1")
        assert one["parameters"] > one["trainable"] > 0
        assert 0 < one["parameters"] - one["base"] <= one["trainable"]  # a drawn label head is of the base, and trained
        assert one["parameters"] - one["trainable"] == pytest.approx(size, rel=1e-3)
    assert len(largest) >= 12


@pytest.mark.slow
def test_an_8b_on_4_bits_fits_a_consumer_card(assets, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(plan, "POLICIES", ("full",))
    overrides = {
        "model": {"path": str(assets / "hf-configs" / "llama3_1_8b"), "remat": "full"},
        "tune": {"lora": {"r": 16}},
        "data": {"packing": True, "max_length": 4096},
        "train": {"batch_size": 1},
    }

    def total(**model):
        config = overrides | {"model": overrides["model"] | model}
        (tmp_path / "c.py").write_text(f"def get_config():\n    return {config}\n")
        found = planned(capsys, tmp_path / "c.py", "--gpu=rtx4090")[0]["policies"]["full"]["bytes"]
        return found["frozen"] / 2**30, found["total"] / 2**30

    plain, small = total(), total(quantization="nf4")
    # 6.98e9 weights of the body: 16 bits become 4.127.
    assert plain[0] - small[0] == pytest.approx(6.979e9 * (16 - 4.127) / 8 / 2**30, rel=1e-3)
    assert small[1] < 22


# ------------------------------------------------------------------------------------------- what a trace holds at once


def held(fn, *shapes):
    return liveness.peak(jax.make_jaxpr(fn)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def test_what_a_trace_holds_at_once():
    """By hand, in arrays of n x n: fused operations are free, products are whole, a product may add to another."""
    n = 16
    whole, square = 4 * n * n, (n, n)
    assert held(lambda x: jnp.sin(x) * 2 + x, square) == whole  # the result
    assert held(lambda x: (jnp.sin(x) * 2).sum(), square) == 4
    assert held(lambda x, w: x @ w, square, square) == whole
    assert held(lambda x, w: jnp.sin(x) @ w, square, square) == 2 * whole  # a product reads whole arrays
    assert held(lambda x, w: x @ w @ w @ w, square, square) == 2 * whole
    assert held(lambda x, w: jnp.sin(x @ w) + jnp.cos(x @ w + 1), square, square) == 2 * whole
    assert held(lambda x, w: x @ w + w @ x, square, square) == whole
    assert held(lambda x, w: (jnp.zeros(3), x @ w)[0], square, square) <= 12  # the product is read by nobody

    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, ws)

    # The carry, what is stacked, and in a turn the new carry; a slice of the weights is read where it lies.
    assert held(layers, square, (5, n, n)) == (1 + 5 + 1) * whole


def test_what_a_scan_stacks_twice_counts_once():
    def stacked(x, ws):
        def body(x, w):
            y = jnp.tanh(x @ w)
            return y, (y.reshape(-1), y.reshape(-1), y.T)

        return jax.lax.scan(body, x, ws)[1]

    found = liveness.returned(jax.make_jaxpr(stacked)(jnp.zeros((4, 4)), jnp.zeros((3, 4, 4))).jaxpr)
    assert len(found) == 2
