"""The mesh: its shape, what lies where by the rules, and what is refused before anything is compiled."""

import jax
import pytest
import runs
import small
from runs import home  # noqa: F401

from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.config.recipe import experiment
from jaxtune.errors import UserError
from jaxtune.methods.table import METHODS
from jaxtune.run.devices import placement
from jaxtune.train.cost import gathered_bytes, held_bytes
from jaxtune.train.parallel import check_model, mesh_shape, spec_of
from jaxtune.tree import map_fields
from jaxtune.weights.packed import quantize

SIZES = {"data": 2, "fsdp": 2, "model": 2}


@pytest.mark.parametrize(
    ("asked", "want"),
    [((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 2), (1, 4, 2)), ((2, 4, 1), (2, 4, 1))],
)
def test_one_axis_may_take_what_the_others_leave(asked, want):
    assert tuple(mesh_shape(8, *asked).values()) == want


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((-1, 3, 1), "3 does not divide the number of devices, which is 8"),
        ((2, 2, 1), "4 is not the number of devices, which is 8"),
        ((-1, -1, 1), "only one axis"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(asked, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(8, *asked)


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        (3, {}, r"the 4 query heads of segment_0/block_0/self_attn/q_proj"),
        (4, {}, r"the 2 key-value heads of segment_0/block_0/self_attn/k_proj; at most 2 do here"),
        (2, {"intermediate_size": 25}, r"the 25 channels .* of segment_0/block_0/mlp/up_proj"),
    ],
)
def test_a_model_that_the_mesh_does_not_divide(parts, changes, message):
    with pytest.raises(UserError, match=message):
        check_model(small.decoder(**changes).spec, parts)


def where(params, sizes=None):
    """{path: the spec} of what is split."""
    found = {}

    def add(path, x, field):
        if spec := tuple(spec_of(path, x.shape, field, sizes or SIZES)):
            found[path] = spec

    map_fields(add, params)
    return found


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_matrices_are_split_and_layers_ranks_vectors_and_factors_are_not(kind):
    def tuned():
        params = small.decoder(tie_word_embeddings=False).init_params(jax.random.key(0))
        base = quantize(params, kind) if kind else params
        return METHODS["lora"](base, jax.random.key(1), small.decoder(), {"r": 2})[0]

    found = where(jax.eval_shape(tuned))
    inside = {None: ("",), "int8": ("/q", "/scale"), "nf4": ("/codes", "/absmax", "/scale", "/offset")}[kind]
    block = "segment_0/block_0"
    for name in ("self_attn/q_proj", "self_attn/k_proj", "mlp/up_proj"):
        assert found[f"{block}/{name}/kernel/w{inside[0]}"] == (None, "fsdp", "model")
    for name in ("self_attn/o_proj", "mlp/down_proj"):
        assert found[f"{block}/{name}/kernel/w{inside[0]}"] == (None, "model", "fsdp")
    assert found["lm_head/kernel"] == ("fsdp", None)  # 61 tokens are not even
    assert found["embed_tokens/embedding"] == (None, "fsdp")
    assert not any(path.endswith(("/a", "/b", "/bias", "norm/scale", "/offset")) for path in found)
    assert all(spec[0] is None for path, spec in found.items() if path.startswith("segment"))


def test_experts_are_split_over_model():
    names = {"gate_up_experts": (None, "model", "fsdp", None), "router": ()}
    for name, want in names.items():
        shape = (3, 4, 16, 24) if want else (3, 16, 4)
        assert tuple(spec_of(f"segment_0/block_0/mlp/{name}", shape, None, SIZES)) == want


def test_bytes_on_a_device():
    params = {"segment_0": {"up_proj": {"kernel": jax.ShapeDtypeStruct((3, 16, 24), "float32")}}}
    params["norm"] = {"scale": jax.ShapeDtypeStruct((16,), "float32")}
    assert held_bytes(params, {}) == 4 * (3 * 16 * 24 + 16)
    assert held_bytes(params, {"data": 2, "fsdp": 4}) == 4 * (3 * 16 * 6 + 16)
    assert gathered_bytes(params, {"data": 2, "fsdp": 4}) == (4 * 16 * 24, 0)


def opened(home, **settings):  # noqa: F811
    overrides = {"model": {"path": str(home / "model")}, "data": {"train": str(home / "train.jsonl")}}
    return experiment(resolve(overrides, {k.replace("__", "."): v for k, v in settings.items()}))


def test_frozen_weights_stay_whole_where_they_fit(home):  # noqa: F811
    asked = {"mesh__fsdp": "4", "mesh__data": "2"}
    plenty, little = (lambda: 2**40), (lambda: 1)
    run = opened(home, **asked)
    sizes, note = placement(run, 8, plenty, "cpu")
    assert sizes == {"data": 8, "fsdp": 1, "model": 1}
    assert "Frozen weights are whole on each" in note and "where they fit" in note
    sizes, note = placement(run, 8, little, "cpu")
    assert sizes == {"data": 2, "fsdp": 4, "model": 1}
    assert "Frozen weights are split" in note and "moments whole on each" in note
    assert placement(opened(home, mesh__frozen="split", **asked), 8, plenty, "cpu")[0]["fsdp"] == 4
    assert placement(opened(home, mesh__frozen="whole", **asked), 8, little, "cpu")[0]["fsdp"] == 1
    sizes, note = placement(opened(home, tune__method="full", **asked), 8, plenty, "cpu")
    assert sizes["fsdp"] == 4
    assert "trained ones and moments split" in note


def test_params_shows_what_lies_where(home, capsys):  # noqa: F811
    argv = runs.command(home, None, "--mesh", "--devices=4", mesh__fsdp=4, mesh__frozen="split", data__eval=None)
    argv = [word for word in argv if ".eval_every" not in word]
    assert main(["params", *argv[1:]]) == 0
    shown = capsys.readouterr().out
    assert "segment_0/block_0/self_attn/q_proj/kernel/w" in shown
    assert "float32[2, 16/fsdp, 16]" in shown
    assert "float32[2, 16, 2]" in shown  # a factor
    assert "Devices: data 1 x fsdp 4 x model 1." in shown
