"""Generation against transformers token for token, samplers against numpy, and what must not change a result."""

import collections
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from jaxtune import cli
from jaxtune.errors import UserError
from jaxtune.infer import generation as g
from jaxtune.infer.generation import bucket, cut, filter_logits, generate, generate_text
from jaxtune.infer.source import Tuned, eos_ids, find, load_target
from jaxtune.weights.packed import QuantWeight

LENGTHS = (9, 1, 14, 5, 3)


def prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, zoo.VOCAB, n).tolist() for n in lengths]


def theirs(name, prompt, new, eos=None):
    """transformers' greedy continuation of one prompt, alone in its batch."""
    import torch

    ids = torch.tensor([prompt])
    out = zoo.model(name).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


# -------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
def test_greedy_equals_transformers(name):
    module, params = zoo.ours(name)
    want = [theirs(name, p, 20) for p in prompts()]
    assert generate(module, params, prompts(), max_new_tokens=20) == want
    assert len({tuple(w[:3]) for w in want}) > 1  # the oracle depends on the prompt


def test_a_row_ends_with_its_eos_and_the_others_go_on():
    module, params = zoo.ours("llama")
    free = [theirs("llama", p, 20) for p in prompts()]
    eos = free[0][4]
    want = [theirs("llama", p, 20, eos) for p in prompts()]
    assert generate(module, params, prompts(), max_new_tokens=20, eos_ids=(eos,)) == want
    assert len({len(w) for w in want}) > 1


def test_up_to_the_last_position():
    module, params = zoo.ours("gpt2")
    prompt = prompts((60,))[0]
    assert generate(module, params, [prompt, prompt[:3]], max_new_tokens=4)[0] == theirs("gpt2", prompt, 4)


def test_lora_is_merged_and_quantised_bases_are_served():
    module, params = zoo.ours("llama")
    tuned = zoo.with_lora(params, jax.random.key(0))
    start = prompts((5, 5))
    new = generate(module, tuned, start, max_new_tokens=6)
    whole = jnp.array([p + n for p, n in zip(start, new, strict=True)])
    scores = module.apply({"params": tuned}, whole)  # unmerged, no cache
    assert scores[:, 4:-1].argmax(-1).tolist() == new
    assert new != generate(module, params, start, max_new_tokens=6)

    kernel = params["segment_0"]["block_0"]["mlp"]["up_proj"]["kernel"]
    block = params["segment_0"]["block_0"]
    quantised = QuantWeight.quantize(kernel)
    quant = params | {
        "segment_0": {"block_0": block | {"mlp": block["mlp"] | {"up_proj": {"kernel": quantised}}}},
    }
    plain = params | {
        "segment_0": {"block_0": block | {"mlp": block["mlp"] | {"up_proj": {"kernel": quantised.merge()}}}},
    }
    assert generate(module, quant, prompts(), max_new_tokens=6) == generate(module, plain, prompts(), max_new_tokens=6)


def test_the_cache_is_read_in_bfloat16():
    module, params = zoo.ours("llama")
    half = module.clone(dtype=jnp.bfloat16)
    ready = g.prepare(half, params)
    assert ready["lm_head"]["kernel"].dtype == jnp.bfloat16
    assert ready["norm"]["scale"].dtype == params["norm"]["scale"].dtype  # norms are computed in float32
    assert [len(r) for r in generate(half, params, prompts(), max_new_tokens=7)] == [7] * len(LENGTHS)


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("top_k, top_p", [(0, 0.7), (3, 1.0), (5, 0.6), (0, 1.0), (1, 1.0), (100, 1e-6)])
def test_filters_against_the_definition(top_k, top_p):
    logits = np.random.default_rng(1).normal(size=(4, 11)).astype(np.float32) * 2
    got = np.asarray(filter_logits(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)))
    for row, out in zip(logits, got, strict=True):
        ranked = np.argsort(-row)[: top_k or None]
        p = np.exp(row[ranked] - row.max())
        p /= p.sum()
        enough = 1 + int(np.searchsorted(np.cumsum(p), top_p)) if top_p < 1 else len(p)
        kept = set(ranked[:enough])
        assert set(np.flatnonzero(out > g.NEG)) == kept
        assert all(out[i] == row[i] for i in kept)


@pytest.mark.slow
def test_draws_follow_the_softmax_at_a_temperature():
    module, params = zoo.ours("llama")
    prompt, n, temperature = [5, 9, 11], 2048, 3.0
    logits = np.asarray(module.apply({"params": params}, jnp.array([prompt]))[0, -1], np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    drawn = generate(module, params, [prompt] * n, max_new_tokens=1, temperature=temperature, batch_size=512)
    counts = collections.Counter(t for (t,) in drawn)
    shares = np.array([counts[i] / n for i in range(zoo.VOCAB)])
    assert np.abs(shares - p).max() < 4 * 0.5 / np.sqrt(n)
    assert p.max() < 0.9  # a draw, not a certainty


def test_top_k_1_is_greedy():
    module, params = zoo.ours("llama")
    greedy = generate(module, params, prompts(), max_new_tokens=6)
    assert generate(module, params, prompts(), max_new_tokens=6, temperature=2.0, top_k=1) == greedy


@pytest.mark.slow
def test_draws_depend_on_the_seed_and_the_prompt_alone():
    module, params = zoo.ours("llama")
    settings = {"max_new_tokens": 12, "temperature": 2.0, "top_p": 0.95}
    same = [prompts((4,))[0]] * 3
    many = prompts() + same
    one = generate(module, params, many, seed=3, **settings)
    assert generate(module, params, many, seed=3, batch_size=3, **settings) == one
    assert generate(module, params, many, seed=4, **settings) != one
    assert len({tuple(row) for row in one[-3:]}) == 3


# ------------------------------------------------------------------------------------------------- programs and shapes


@pytest.mark.slow
def test_one_program_serves_a_bucket():
    module, params = zoo.ours("qwen3")
    module = module.clone(unroll=2)  # programs of its own

    def programs():
        return g._prefill._cache_size(), g._decode._cache_size()

    generate(module, params, prompts(), max_new_tokens=9, temperature=1.0, top_k=4)
    before = programs()
    generate(module, params, prompts((2, 20, 30, 7, 8, 9), seed=1), max_new_tokens=21, temperature=0.3, top_k=9, seed=5)
    assert programs() == before
    generate(module, params, prompts((2,)), max_new_tokens=2)
    assert programs() == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("n, slots", [(1, 64), (64, 64), (65, 128), (512, 512), (513, 640), (1025, 1280), (4096, 4096)])
def test_buckets(n, slots):
    assert bucket(n) == slots


def test_watch_sees_every_row_and_can_end_it():
    module, params = zoo.ours("llama")
    want = generate(module, params, prompts(), max_new_tokens=20)
    seen = {}

    def watch(i, new):
        assert new[: len(seen.get(i, []))] == seen.get(i, [])
        seen[i] = new
        return i == 2

    got = generate(module, params, prompts(), max_new_tokens=20, watch=watch, watch_every=8, batch_size=3)
    assert seen == dict(enumerate(got))
    assert [len(r) for r in got] == [20, 20, 9, 20, 20]
    assert all(a == b[: len(a)] for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompts": [[5], []]}, ("Prompt 2", "empty")),
        ({"prompts": [[5, zoo.VOCAB]]}, ("96", "96 tokens")),
        ({"prompts": [[3] * 60], "max_new_tokens": 5}, ("60 tokens", "65", "64 positions", "4 or less")),
        (
            {"prompts": [[3] * 64], "max_new_tokens": 1},
            (
                "64 tokens",
                "64 positions: shorten",
            ),
        ),
        ({"max_new_tokens": 0}, ("max_new_tokens=0",)),
        ({"temperature": -1.0}, ("temperature=-1.0",)),
        ({"top_p": 0.0}, ("top_p=0.0",)),
        ({"top_k": -1}, ("top_k=-1",)),
        ({"batch_size": 0}, ("batch_size=0",)),
    ],
)
def test_refused_before_compile(changes, words):
    module, params = zoo.ours("llama")
    given = {"prompts": [[5]], "max_new_tokens": 4} | changes
    with pytest.raises(UserError) as error:
        generate(module, params, given.pop("prompts"), **given)
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def stories(assets):
    return load_target(assets / "models" / "stories260k")


def test_stories260k_tells_its_story(assets, stories):
    published = (assets / "models" / "stories260k" / "UPSTREAM.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    (text,) = generate_text(*stories[:3], ["Once upon a time"], max_new_tokens=257)
    assert ("Once upon a time" + text).startswith(published)


def test_stop_strings_cut_each_text(stories):
    module, params, tokenizer = stories[:3]
    starts = ["Once upon a time", "Tom and Anna were at the"]
    whole = generate_text(module, params, tokenizer, starts, max_new_tokens=64)
    stop = (" big", ".")
    got = generate_text(module, params, tokenizer, starts, max_new_tokens=64, stop=stop)
    assert got == [cut(text, stop)[0] for text in whole]
    assert all(text and "." not in text for text in got)


def test_text_is_streamed_as_it_grows(stories):
    seen = []
    (text,) = generate_text(
        *stories[:3], ["Once upon a time"], max_new_tokens=20, on_text=lambda i, t: seen.append((i, t))
    )
    assert len(seen) > 3 and seen[-1] == (0, text)
    assert all(text.startswith(part) for _, part in seen)


@pytest.mark.parametrize(
    "text, stop, want",
    [("a\nb", ("\n",), ("a", True)), ("abc", ("c", "b"), ("a", True)), ("abc", (), ("abc", False))],
)
def test_cut(text, stop, want):
    assert cut(text, stop) == want


@hypothesis.given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_while_a_text_grows_stays_in_the_result(text, stop):
    end, _ = cut(text, stop)
    for n in range(len(text) + 1):
        part, stopped = cut(text[:n], stop)
        shown = part if stopped else part[: len(part) - g._begun(part, stop)]
        assert end.startswith(shown)


def test_an_empty_stop_string_is_refused(stories):
    with pytest.raises(UserError, match="An empty stop string"):
        generate_text(*stories[:3], ["x"], max_new_tokens=4, stop=("a", ""))


def test_prompts_are_tokenised_as_in_training(assets, stories):
    from transformers import AutoTokenizer

    story = stories.tokenizer
    once, marked = g.encode_prompts(story, ["Once", "<s>Once"])
    assert once == [1, *story("Once", add_special_tokens=False).input_ids]
    assert marked[0] == 1 and marked.count(1) == 1
    (chat,) = g.encode_prompts(story, ["Hi"], chat=True)
    assert story.decode(chat) == "<s>### User:\nHi\n\n### Assistant:\n"
    qwen = AutoTokenizer.from_pretrained(assets / "tokenizers" / "qwen3", trust_remote_code=False)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    want = qwen.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert g.encode_prompts(qwen, [messages], chat=True) == [want]


def test_end_tokens_come_from_all_who_name_them(tmp_path, stories):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert eos_ids(stories.tokenizer, Tuned(tmp_path, "base")) == (2, 7, 8, 9)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    assert eos_ids(stories.tokenizer, Tuned(tmp_path, "base", adapter=tmp_path / "adapter")) == (2, 5, 7, 8, 9)


def test_a_special_token_as_a_stop_ends_a_text(stories, monkeypatch):
    module, params, tokenizer, *_ = stories
    seen = {}

    def once(module, params, ids, *, eos_ids, **settings):
        seen["eos"] = list(eos_ids)
        return [[*tokenizer("a b", add_special_tokens=False).input_ids, tokenizer.bos_token_id]] * len(ids)

    monkeypatch.setattr(g, "generate", once)
    (text,) = generate_text(module, params, tokenizer, ["x"], stop=("<s>", " b"), eos_ids=(9,), max_new_tokens=4)
    assert text.strip() == "a"
    assert seen["eos"] == [9, tokenizer.bos_token_id]


# ------------------------------------------------------------------------------------------------------- the command


def run(capsys, *argv):
    status = cli.main(["generate", *map(str, argv)])
    return status, *capsys.readouterr()


def test_a_prompt(capsys, assets, stories):
    folder = assets / "models" / "stories260k"
    status, out, _ = run(capsys, folder, "--prompt=Once upon a time", "--max-new-tokens=12", "--stop=,")
    assert (status, out) == (0, "\n")
    status, out, _ = run(capsys, folder, "--prompt=Once upon a time", "--max-new-tokens=12")
    (want,) = generate_text(*stories[:3], ["Once upon a time"], max_new_tokens=12)
    assert (status, out) == (0, want + "\n")


def test_files_in_and_out(capsys, tmp_path, assets, stories):
    folder = assets / "models" / "stories260k"
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("Once upon\n\nThe dog\n")
    rows.write_text('{"prompt": "Once upon", "id": 1}\n{"prompt": "The dog"}\n')
    out = tmp_path / "out.jsonl"
    status, said, _ = run(capsys, folder, f"--file={lines}", "--max-new-tokens=8")
    assert status == 0
    printed = [json.loads(line) for line in said.splitlines()]
    want = generate_text(*stories[:3], ["Once upon", "The dog"], max_new_tokens=8)
    assert printed == [{"prompt": p, "completion": t} for p, t in zip(("Once upon", "The dog"), want, strict=True)]
    assert run(capsys, folder, f"--file={rows}", "--max-new-tokens=8", f"--out={out}")[0] == 0
    assert [json.loads(line)["completion"] for line in out.read_text().splitlines()] == want
    status, _, err = run(capsys, folder, f"--file={rows}", "--max-new-tokens=8", f"--out={out}")
    assert status == 2 and "not overwritten" in err


def test_a_chat_keeps_the_conversation(capsys, monkeypatch, assets, stories):
    folder = assets / "models" / "stories260k"
    said = iter(["Hello", "Who is Lily?", "", "Hello"])

    def answer(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    status, out, _ = run(capsys, folder, "--max-new-tokens=12")
    first = [{"role": "user", "content": "Hello"}]
    settings = {"max_new_tokens": 12, "chat": True}
    (one,) = generate_text(*stories[:3], [first], **settings)
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "Who is Lily?"}]
    (two,) = generate_text(*stories[:3], [second], **settings)
    assert status == 0
    assert out.partition("Ctrl-D ends.\n")[2] == f"{one}\n{two}\n{one}\n\n"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("p.txt", "\n \n", ("p.txt", "no prompt")),
        ("p.jsonl", "", ("p.jsonl", "no prompt")),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', ("p.jsonl:2", "promt", "'prompt'")),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', ("p.jsonl:2", "JSON")),
        ("p.jsonl", '{"prompt": 3}\n', ("p.jsonl:1", "string")),
        ("p.jsonl", '{"prompt": [{"role": "user", "content": "x"}]}\n', ("p.jsonl:1", "--chat")),
        ("p.csv", "a\n", ("p.csv", ".jsonl")),
    ],
)
def test_prompt_files_that_are_wrong(capsys, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    status, out, err = run(capsys, tmp_path, f"--file={tmp_path / name}")
    assert status == 2 and out == ""
    assert all(word in err for word in words), err


def test_targets_that_are_wrong(capsys, tmp_path):
    model = zoo.directory("llama")
    for argv, words in [
        ([model, "--prompt=x"], ("tokenizer",)),
        ([tmp_path / "absent", "--prompt=x"], ("absent", "does not exist")),
        ([model], ("--prompt", "terminal")),
        ([model, "--prompt=x", f"--file={tmp_path}/x.txt"], ("--prompt", "--file")),
        ([model, f"--file={tmp_path}/x.txt"], ("x.txt", "no such file")),
    ]:
        status, _, err = run(capsys, *argv)
        assert status == 2 and all(word in err for word in words), err


def test_a_model_without_weights(capsys, tmp_path, assets):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((assets / "models" / "stories260k" / name).read_bytes())
    status, _, err = run(capsys, tmp_path, "--prompt=x")
    assert status == 2 and "no weights" in err


def test_a_run_with_its_adapter(tmp_path, assets, stories):
    from jaxtune.hf.peft import export_adapter

    base = assets / "models" / "stories260k"
    tuned = zoo.with_lora(stories.params, jax.random.key(1), r=8)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps({"model": {"path": str(base)}, "tune": {"method": "lora"}}))
    with pytest.raises(UserError, match="no result yet"):
        load_target(run_dir)
    export_adapter(stories.module, tuned, run_dir / "adapter", base=str(base))
    start = ["Once upon a time"]
    want = generate_text(stories.module, tuned, stories.tokenizer, start, max_new_tokens=12)
    assert want != generate_text(*stories[:3], start, max_new_tokens=12)
    for target in (
        load_target(run_dir),
        load_target(run_dir / "adapter"),
        load_target(find(base, adapter=run_dir / "adapter")),
    ):
        assert generate_text(*target[:3], start, max_new_tokens=12) == want
