"""The model for lm-evaluation-harness against its own Hugging Face backend, on local tasks, request by request."""

import json

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from runs import compiled, home  # noqa: F401

from jaxtune import cli
from jaxtune.infer import continuations, logprobs

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'jaxtune[eval]'")
pytestmark = [
    # Of its dependencies and of the oracle, not of ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!jaxtune)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(?!jaxtune)"),
]


@pytest.fixture(scope="module", autouse=True)
def gradients_stay_on():
    """The harness switches torch's gradients off for the whole process."""
    import torch

    yield
    torch.set_grad_enabled(True)


TASKS = {
    "pick": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "surprise": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
""",
    "goon": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}
DOCS = [
    {"question": "Once upon a time", "choices": [" there was a girl", " dog", " ran. He"], "answer": 0},
    {"question": "Lily and Tom went to the park", "choices": [" to play.", " and", " x"], "answer": 1},
    {"question": "The big red ball ", "choices": ["rolled away", "is mine"], "answer": 0},
    {"question": "Mom said: ", "choices": ["No", "Yes, you can have it after lunch"], "answer": 1},
]
LONG = " ".join(f"Then Tim saw the bird number {i} in the tree." for i in range(40))


def write_tasks(folder):
    """Three tasks over the same documents, one of which is longer than the models here."""
    docs = [d | {"text": f"{d['question']}, they all lived in house {i}."} for i, d in enumerate(DOCS)]
    docs[1]["text"] = LONG
    runs.write_jsonl(folder / "docs.jsonl", docs)
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/docs.jsonl\n"
        (folder / f"{name}.yaml").write_text(head + "test_split: test\nnum_fewshot: 0\n" + text)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("hf")
        patch.setenv("HF_DATASETS_CACHE", str(home))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", home)
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


def answers(model, tasks, **settings):
    """{(task, document, number of the request): what the model answered}."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )
    return {
        (name, sample["doc_id"], i): response
        for name, samples in found["samples"].items()
        for sample in samples
        for i, response in enumerate(sample["resps"])
    }


def theirs(folder):
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=2, device="cpu")


def same(folder, tasks, batch_size=32, **settings):
    from jaxtune.evaluate.lm import JaxtuneLM

    got = answers(JaxtuneLM(target=str(folder), batch_size=batch_size), tasks, **settings)
    want = answers(theirs(folder), tasks, **settings)
    assert got.keys() == want.keys() and len(got) >= 18
    texts = 0
    for key, [expected] in want.items():
        [answer] = got[key]
        if key[0] == "pick":
            assert answer[0] == pytest.approx(expected[0], abs=1e-4, rel=1e-6), key
            assert answer[1] == expected[1]
        elif key[0] == "surprise":
            assert answer == pytest.approx(expected, rel=1e-6, abs=1e-4), key
        else:
            assert answer == expected, key
            texts += bool(answer)
    return texts


def test_each_request_as_in_the_hugging_face_backend(home, tasks):  # noqa: F811
    same(home / "model", tasks)


def test_each_request_where_contexts_are_read_once(home, tasks, monkeypatch):  # noqa: F811
    """As they are for larger models; and the last of several batches of prompts is filled up."""
    shared = []
    score = continuations.score_shared
    monkeypatch.setattr(continuations, "worth_a_compile", lambda params: 0)
    monkeypatch.setattr(continuations, "score_shared", lambda *args: shared.append(args) or score(*args))
    same(home / "model", tasks, batch_size=3)
    assert shared


@pytest.mark.slow
def test_stories260k_as_in_the_hugging_face_backend(assets, tasks):
    assert same(assets / "models" / "stories260k", tasks) >= 2  # texts that are not empty


def test_prompts_through_the_chat_template(home, tasks):  # noqa: F811
    from jaxtune.data.chat import DEFAULT_TEMPLATE
    from jaxtune.evaluate.lm import JaxtuneLM

    ours = JaxtuneLM(target=str(home / "model"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    want = ours.tokenizer.apply_chat_template(
        messages, chat_template=DEFAULT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert ours.apply_chat_template(messages) == want
    ours.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert ours.apply_chat_template(messages) == "[Be brief.][Hi]>"


def test_a_run_on_a_task(home, tasks, tmp_path, capsys):  # noqa: F811
    """The base's and the tuned model's numbers reach eval.json, and the part of held-out rows stays."""
    runs.write_run(home, tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text('{"held_out": {"metrics": {}, "rows": 0}}')
    argv = ["eval", str(tmp_path / "run"), "--tasks=pick", f"--include-path={tasks}", "--limit=3"]
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["held_out"] == {"metrics": {}, "rows": 0}
    results = found["tasks"]["results"]
    assert set(results) == {"base", "tuned"}
    assert all(results[who]["pick"]["acc"]["value"] in (0, 1 / 3, 2 / 3, 1) for who in results)
    assert "pick" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_task_that_is_not_known(home, tasks, capsys):  # noqa: F811
    assert cli.main(["eval", str(home / "model"), "--tasks=surprize", f"--include-path={tasks}"]) == 2
    said = capsys.readouterr().err
    assert "'surprize'" in said and "Did you mean 'surprise'?" in said
    assert cli.main(["eval", str(home / "model"), "--tasks=pick", f"--include-path={tasks / 'absent'}"]) == 2
    assert "no such folder" in capsys.readouterr().err


@given(st.lists(st.integers(1, 500), min_size=1, max_size=400))
def test_batches_take_few_shapes_and_little_more_room(lengths):
    batches = logprobs.batches_by_length(lengths, 4096)
    shapes = logprobs.shapes(lengths, batches, 4096, 512)
    own = [logprobs.shapes(lengths, [batch], 4096, 512)[0] for batch in batches]
    for batch, shape in zip(batches, shapes, strict=True):
        assert len(batch) <= shape.rows and max(lengths[i] for i in batch) <= shape.width <= 512
    assert set(shapes) <= set(own)
    grown = sum(a.rows * a.width - b.rows * b.width for a, b in zip(shapes, own))
    assert 0 <= grown <= 4096 * (len(set(own)) - len(set(shapes)))


def test_many_batches_of_a_shape_keep_it_and_few_take_the_next():
    lengths = [400] * 8 + [380] * 8 + [200] * 16
    batches = logprobs.batches_by_length(lengths, 4096)
    assert logprobs.shapes(lengths, batches, 4096, 512) == [(8, 416), (8, 416), (16, 208)]
    lengths = [400] * 8 + [380] * 8 * 17
    assert set(logprobs.shapes(lengths, logprobs.batches_by_length(lengths, 4096), 4096, 512)) == {(8, 416), (8, 384)}
