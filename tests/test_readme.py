"""The README's Python examples run, in order, as one reader would run them."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README.read_text(), re.S))


@pytest.fixture(scope="module")
def reader():
    """What a reader has in the interpreter after the first example."""
    names: dict = {}
    exec(EXAMPLES["loop"], names)
    names["metrics_alone"] = names["metrics"]["loss"]
    return names


def test_every_example_is_short():
    assert set(EXAMPLES) == {"loop", "sweep", "grad", "adapt", "peft"}
    assert all(len(code.strip().splitlines()) < 20 for code in EXAMPLES.values())


def test_loop_lowers_the_loss(reader):
    frozen, batches = reader["frozen"], reader["batches"]
    state = reader["jaxtune"].init_state(reader["trainable"], reader["member"], reader["tx"], jax.random.key(1))
    plain = reader["jaxtune"].make_train_step(
        reader["jaxtune"].causal_lm(reader["module"], packed=True), reader["tx"], jit=False
    )
    _, first = jax.jit(plain)(state, frozen, batches.batch(0))
    assert float(reader["metrics_alone"]) < float(first["loss"]) - 0.3


def test_sweep_trains_each_member_at_its_own_rate(reader):
    exec(EXAMPLES["sweep"], reader)
    losses = np.asarray(reader["metrics"]["loss"])
    assert losses.shape == (4,) and len(set(losses.tolist())) == 4
    # The third member has the rate of the first example, the same start and the same data.
    np.testing.assert_allclose(losses[2], float(reader["metrics_alone"]), rtol=1e-4)


def test_grad_exists_for_the_trainable_part_only(reader):
    exec(EXAMPLES["grad"], reader)
    assert jax.tree.structure(reader["grads"]) == jax.tree.structure(reader["trainable"])


def test_adapted_model_is_the_merged_one(reader):
    exec(EXAMPLES["adapt"], reader)
    wanted = reader["model"].apply(reader["jaxtune"].merge(reader["lora"]), reader["x"])
    assert len(reader["layouts"]) == 5
    np.testing.assert_allclose(reader["y"], wanted, atol=1e-6)


def test_peft_snippet_prints_pefts_line(reader, capsys):
    exec(EXAMPLES["peft"], reader)
    assert re.fullmatch(
        r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}\n", capsys.readouterr().out
    )
