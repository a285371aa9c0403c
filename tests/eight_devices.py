"""Run by test_step.py in a process of its own, with eight simulated devices: numbers to compare, as an npz file."""

import json
import math
import os
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import small
import test_embedding
from jax.sharding import Mesh

from jaxtune import models
from jaxtune.hf import tensors
from jaxtune.hf.load import load, open_module, read_config, read_params
from jaxtune.hf.peft import export_adapter
from jaxtune.infer.generation import generate
from jaxtune.infer.logprobs import score_batch
from jaxtune.methods.table import METHODS as MAKE
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.objectives.distillation import Strength, Teacher, distillation
from jaxtune.objectives.preference import judged, preference
from jaxtune.objectives.reward import reward
from jaxtune.objectives.task import OBJECTIVE
from jaxtune.train.checkpoint import Checkpoints
from jaxtune.train.optim import optimizer
from jaxtune.train.parallel import make_mesh, place, replicate, shard_batch, shardings
from jaxtune.train.stacked import make_sweep_step, stack
from jaxtune.train.step import init_state, make_train_step, value_and_grad
from jaxtune.tree import MEMBER, TRAIN, Beside, combine, flatten, partition

STEPS, ORACLE_STEPS = 50, 8
LORA = {"r": 2, "lora_dropout": 0.2}
ELASTIC = {  # meshes, and steps on them
    "full": (({"devices": 4, "fsdp": 4}, 3), ({"devices": 1}, 3), ({"fsdp": 2, "model": 2}, 2)),
    "lora": (({"devices": 4}, 3), ({"devices": 1}, 3), ({"fsdp": 8}, 2)),
}
SHAPES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f in (4, 8)]  # two key-value heads
METHODS = {"full": {}, "head": {}, "lora": LORA}
MESHED = [(s, m) for s in SHAPES for m in ("full", "lora") if (s, m) != ((8, 1, 1), "lora")]  # `main` has that


def gradients(mesh: Mesh | None, accum: int, method: str = "lora", packed: bool = False):
    """(sum, weight, grads) of one batch of eight rows with dropout, in `accum` micro-batches over the mesh."""
    part, _ = small.tuned(method, **METHODS[method])
    fn = jax.jit(value_and_grad(causal_lm(small.decoder(), packed=packed), mesh))
    batch = small.batch(accum=accum)
    if packed:
        batch["segments"] = batch["segments"] + (batch["positions"] > 6)
    if mesh is None:
        return fn(*part, batch, jax.random.key(5))
    return fn(*(place(tree, mesh) for tree in part), shard_batch(batch, mesh), jax.random.key(5))


class Scored:
    """A decoder whose score of a text is a number of its last hidden state."""

    @staticmethod
    def apply(variables, tokens, positions, segments, keys=None):
        return small.decoder().apply(variables, tokens, positions, None, keys=keys, method="hidden")[:, -1, 0]


NUMBERS = ("beta", "gamma", "label_smoothing")
ANSWERS = {  # loss -> (loss_fn, the numbers it is told)
    "preference": (preference(small.decoder(), {"sigmoid": 1.0, "simpo": 0.5}, sft=0.5, reference="live"), NUMBERS),
    "kto": (judged(small.decoder()), ("beta", "desirable_weight", "undesirable_weight")),
    "reward": (reward(Scored, 0.1), ()),
    "distillation": (
        distillation(small.decoder(), Teacher(None, small.decoder(), small.VOCAB), Strength("jsd", 0.3)),
        (),
    ),
    "embedding": (test_embedding.loss_fn(), ()),  # each text compared with those of all devices
}
BATCHES = {"distillation": small.batch, "embedding": lambda: test_embedding.batch(16, 2)}


def answers(mesh: Mesh | None, name: str):
    """(sum, weight, grads) of rows, pairs or texts under a loss that is no language model's own."""
    loss_fn, told = ANSWERS[name]
    part, mask = small.tuned(r=2)
    if told:
        params, roles = combine(*part), dict.fromkeys(told, MEMBER)
        numbers = {number: jnp.float32(0.3) for number in told}
        part = partition(params | {OBJECTIVE: numbers}, mask | {OBJECTIVE: roles})
    if name == "distillation":
        part = part._replace(frozen=Beside(part.frozen, small.weights(3)))
    batch = BATCHES.get(name, small.pairs)()
    fn = jax.jit(value_and_grad(loss_fn, mesh))
    return fn(*part, batch if mesh is None else shard_batch(batch, mesh), jax.random.key(5))


def losses(mesh: Mesh | None, method: str = "lora", steps: int = STEPS, accum: int = 1) -> np.ndarray:
    """Losses of our step, AdamW at 1e-3."""
    part, _ = small.tuned(method, **METHODS[method])
    tx = optimizer("adamw", lr=1e-3, weight_decay=0.1, grad_clip=1.0)
    step = make_train_step(causal_lm(small.decoder()), tx, mesh)
    # The weights are shared between calls, and what is trained is donated.
    state = jax.tree.map(jnp.array, init_state(part.trainable, part.member, tx, jax.random.key(5)))
    frozen = part.frozen
    if mesh is not None:
        state, frozen = replicate(state, mesh), replicate(frozen, mesh)
    found = []
    for i in range(steps):
        batch = small.batch(i, accum=accum)
        state, metrics = step(state, frozen, batch if mesh is None else shard_batch(batch, mesh))
        found.append(float(metrics["loss"]))
    return np.array(found)


def elastic_losses(method: str) -> tuple[np.ndarray, list[str]]:
    """Losses of `losses` for a run that is interrupted and goes on from its checkpoint on other devices, twice.

    And the programs.
    """
    part, _ = small.tuned(method, **METHODS[method])
    tx = optimizer("adamw", lr=1e-3, weight_decay=0.1, grad_clip=1.0)
    found, programs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for devices, steps in ELASTIC[method]:
            mesh = make_mesh(**devices)
            start = init_state(part.trainable, part.member, tx, jax.random.key(6))  # a key that is not the run's
            state, frozen = place(start, mesh), place(part.frozen, mesh)
            checkpoints = Checkpoints(Path(folder), keep=1)
            if found:
                state, _ = checkpoints.restore(lambda _, like=state: like)
                assert int(state.step) == len(found)
                assert all(x.sharding.mesh.shape == mesh.shape for x in jax.tree.leaves(state))
            else:
                state = state._replace(key=replicate(jax.random.key(5), mesh))
            split = [x for x in jax.tree.leaves((state, frozen)) if not x.sharding.is_fully_replicated]
            assert bool(split) == ("fsdp" in mesh.shape)
            where = jax.tree.map(lambda x: x.sharding, state)
            step = make_train_step(causal_lm(small.decoder()), tx, mesh)
            step = step.lower(state, frozen, shard_batch(small.batch(), mesh)).compile()
            programs.append(step.as_text())
            for i in range(len(found), len(found) + steps):
                state, metrics = step(state, frozen, shard_batch(small.batch(i), mesh))
                found.append(float(metrics["loss"]))
            same = jax.tree.map(lambda x, w: x.sharding.is_equivalent_to(w, x.ndim), state, where)
            assert all(jax.tree.leaves(same))  # else the next step would be another program
            checkpoints.save(len(found), state, {"runs": []})
            checkpoints.close()
    return np.array(found), programs


def loaded(quantization: str | None) -> np.ndarray:
    """The largest difference of parameters that are put on eight devices as they are read, by leaf."""
    mesh = make_mesh(fsdp=2, model=2)
    with tempfile.TemporaryDirectory() as folder:
        runs.write_weights(Path(folder), small.CONFIG | {"tie_word_embeddings": False, "vocab_size": 62})
        module, want = load(folder, quantization=quantization)
        got = read_params(module, Path(folder), quantization=quantization, lay=partial(shardings, mesh=mesh))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.all(jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), got, shardings(want, mesh)))
    assert got["lm_head"]["kernel"].addressable_shards[0].data.shape == (8, 31)
    return np.array([np.abs(np.float64(a) - np.float64(b)).max() for a, b in zip(*map(jax.tree.leaves, (got, want)))])


def used() -> dict[str, np.ndarray]:
    """What an adapter on a base says that one device holds, and one that lies split over eight: the same."""
    rows = [list(range(1, n)) for n in (6, 11, 4)]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        base, adapter, found = Path(name) / "base", Path(name) / "adapter", {}
        base.mkdir()
        runs.write_weights(base, small.CONFIG | {"tie_word_embeddings": False, "vocab_size": 64})
        module, params = load(base)
        tuned, mask = MAKE["lora"](params, jax.random.key(1), module, {"r": 2})
        tuned = jax.tree.map(lambda x, role: x + 0.1 if role is TRAIN else x, tuned, mask)
        export_adapter(module, tuned, adapter, base=base)
        for where, room in (("one", 2**40), ("eight", 1)):
            patch.setattr("jaxtune.hf.load.free_bytes", lambda room=room: room)
            module, params = load(adapter)
            split = [len(x.sharding.device_set) for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
            assert max(split) == (8 if where == "eight" else 1)
            found[f"used/{where}/0"] = np.concatenate([scores for scores, _ in score_batch(module, params, rows)])
            found[f"used/{where}/1"] = np.array(generate(module, params, rows, max_new_tokens=8))
    return found


def sparse_checkpoint(folder: Path, layers: int, width: int) -> None:
    """A Llama of zeros in bfloat16, whose file takes no disk."""
    config = small.CONFIG | {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config |= {"vocab_size": 4 * width, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    module, header, at = models.build(config), {}, 0
    shapes = {path: leaf.shape for path, leaf in flatten(module.abstract_params()).items()}
    for t in models.names(module).tensors(module.spec, set(shapes)):
        shape = t.part(shapes[t.path])[:: -1 if t.transpose else 1]
        end = at + 2 * math.prod(shape)
        header[t.hf], at = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)


def resident() -> int:
    """Bytes in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reading(layers: int, width: int) -> dict[str, int]:
    """What a process of four devices reads of a checkpoint, and its memory beyond what the devices hold: bytes."""
    highest, over = [0], threading.Event()

    def look():
        while not over.wait(0.001):
            highest[0] = max(highest[0], resident())

    mesh = make_mesh(4, fsdp=4)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder, read, sizes = Path(name), tensors.read, []
        sparse_checkpoint(folder, layers, width)
        patch.setattr(tensors, "read", lambda entry, out=None: sizes.append(entry.nbytes) or read(entry, out))
        module, entries = open_module(read_config(folder), folder), tensors.index_dir(folder)
        before, watch = resident(), threading.Thread(target=look)
        watch.start()
        params = jax.block_until_ready(read_params(module, folder, lay=partial(shardings, mesh=mesh)))
        over.set()
        watch.join()
    own = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    return {
        "read": sum(sizes),
        "parameters": sum(e.nbytes for e in entries.values()),
        "layer": sum(e.nbytes for name, e in entries.items() if ".layers.0." in name),
        "tensor": max(e.nbytes for e in entries.values()),
        "above": highest[0] - before - own,
    }


def memory(out: str) -> None:
    """A checkpoint of 2 GB."""
    np.savez(out, **reading(layers=18, width=2048))


def pmap_losses(method: str) -> np.ndarray:
    """The step as one wrote it before jit met meshes: pmap, every gradient, and optax that discards the frozen ones."""
    part, mask = small.tuned(method, **METHODS[method])
    params = combine(*part)
    labels = jax.tree.map(lambda role: "train" if role is TRAIN else "freeze", mask)
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim >= 2 and "norm" not in jax.tree_util.keystr(path), params
    )
    train = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, mask=lambda p: masked_like(decayed, p)),
    )
    tx = optax.multi_transform({"train": train, "freeze": optax.set_to_zero()}, labels)
    loss_fn = causal_lm(small.decoder())

    def step(params, opt_state, batch, key):
        def loss(params):
            (total, weight), _ = loss_fn(params, batch, key)
            return total, weight

        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(params)
        total, weight, grads = jax.lax.psum((total, weight, grads), "devices")
        updates, opt_state = tx.update(jax.tree.map(lambda g: g / weight, grads), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, total / weight

    pmapped = jax.pmap(step, axis_name="devices", in_axes=(None, None, 0, None), out_axes=(None, None, None))
    opt_state, found = tx.init(params), []
    for i in range(ORACLE_STEPS):
        batch = {k: v[0].reshape(8, 1, *v.shape[2:]) for k, v in small.batch(i).items()}
        params, opt_state, loss = pmapped(params, opt_state, batch, jax.random.fold_in(jax.random.key(5), i))
        found.append(float(loss))
    return np.array(found)


def masked_like(mask, params):
    """The mask where multi_transform shows the parameters, its own placeholder elsewhere."""
    hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda p, m: p if hidden(p) else m, params, mask, is_leaf=hidden)


def main(out: str) -> None:
    assert jax.device_count() == 8
    found = {}
    for name, mesh, accum in (("8 devices", make_mesh(), 1), ("4 devices 2x4", make_mesh(4), 2)):
        found |= numbers(name, gradients(mesh, accum))
    for name in ANSWERS:
        found |= numbers(name, answers(make_mesh(), name))
    found["losses"] = losses(make_mesh())
    for method in METHODS:
        ours = found["losses"][:ORACLE_STEPS] if method == "lora" else losses(make_mesh(), method, ORACLE_STEPS)
        found[f"ours/{method}"] = ours
        found[f"pmap/{method}"] = pmap_losses(method)
    for quantization in ("none", "nf4"):
        found[f"loaded/{quantization}"] = loaded(None if quantization == "none" else quantization)
    found |= {f"reading/{name}": size for name, size in reading(layers=16, width=640).items()}
    for method in ("full", "lora"):
        found[f"elastic/{method}"], programs = elastic_losses(method)
        found |= {f"program/{method}/{i}": np.array(text) for i, text in enumerate(programs)}
    np.savez(out, **found)


def meshes(out: str) -> None:
    """The same in every mesh shape of eight devices, and other steps in the one that has all axes; losses in chunks."""
    pytest.MonkeyPatch().setattr("jaxtune.objectives.token_nats.chunk_size", lambda *sizes: 5)
    found = {}
    for shape, method in MESHED:
        mesh = make_mesh(**dict(zip(("data", "fsdp", "model"), shape, strict=True)))
        found |= numbers(f"{shape}/{method}", gradients(mesh, 1, method))
    mesh = make_mesh(fsdp=2, model=2)
    found |= numbers("micro-batches", gradients(mesh, 2))
    found |= numbers("packed", gradients(mesh, 1, packed=True))
    for name in ANSWERS:
        found |= numbers(name, answers(mesh, name))
    found["members"] = members(mesh)
    found |= used()
    np.savez(out, **found)


def numbers(name: str, tree) -> dict[str, jax.Array]:
    return {f"{name}/{i}": x for i, x in enumerate(jax.tree.leaves(tree))}


def members(mesh: Mesh | None, steps: int = 5) -> np.ndarray:
    """Losses [steps, 2] of two members of a sweep in one step."""
    states = []
    for seed, lr in ((1, 1e-3), (2, 3e-3)):
        part, _ = small.tuned(seed=seed, **LORA)
        tx = optimizer("adamw", lr=lr, grad_clip=1.0)
        states.append(init_state(part.trainable, part.member, tx, jax.random.key(seed)))
    state, frozen, step = stack(states), part.frozen, make_sweep_step(causal_lm(small.decoder()), tx, mesh)
    if mesh is not None:
        state, frozen = place(state, mesh), place(frozen, mesh)
    found = []
    for i in range(steps):
        batch = small.batch(i)
        state, metrics = step(state, frozen, batch if mesh is None else shard_batch(batch, mesh))
        found.append(np.asarray(metrics["loss"]))
    return np.array(found)


if __name__ == "__main__":
    {"main": main, "meshes": meshes, "memory": memory}[(*sys.argv, "main")[2]](sys.argv[1])
