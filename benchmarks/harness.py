"""Tasks of lm-evaluation-harness with its own Hugging Face backend and with jaxtune's model, on CPU.

    python benchmarks/harness.py [--model=DIR] [--docs=200] [--json=OUT]

Without a model it is a random Llama of 56M parameters, as in generate.py, and documents are words of its vocabulary.

Each side is a process of its own, in turn, with the same local tasks: multiple choice, rolling log-likelihood and
generation over made-up documents, no network. "cold" is the first evaluation of a process, with what it compiles;
"warm" is the mean of those after it. Both sides batch: the backend --batch-size rows, jaxtune as it does by default.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}

TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "generation": """output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 32, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
WORDS = """the a little big red old happy girl boy dog cat bird tree ball park house and then saw ran went played found
said to with in on under she he they was very sunny day friend mom""".split()  # noqa: SIM905


def write_tasks(folder: Path, docs: int, known: Sequence[str] = WORDS, start: str = "Once upon a time ") -> None:
    """Write the tasks over documents of `known` words."""
    draw = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(known, k=draw.randint(low, high)))

    with (folder / "docs.jsonl").open("w") as file:
        for _ in range(docs):
            row = {"start": f"{start}{words(5, 60)}", "ends": [f" {words(1, 8)}" for _ in range(4)]}
            file.write(json.dumps(row | {"text": words(40, 220)}) + "\n")
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(head + "test_split: test\nnum_fewshot: 0\n" + text)


def child(a) -> None:
    """Measure one side in this process."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if a.side == "jaxtune":
        import jax.numpy as jnp

        from jaxtune.data import load_tokenizer
        from jaxtune.evaluate.lm import JaxtuneLM
        from jaxtune.hf.load import load

        model = JaxtuneLM(*load(a.model, dtype=jnp.float32), load_tokenizer(a.model), batch_size=a.batch_size)
    else:
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(a.threads)
        model = HFLM(pretrained=a.model, device="cpu", dtype="float32", batch_size=a.batch_size)
    manager = TaskManager(include_path=a.tasks, include_defaults=False)
    figures, results = {}, {}
    for task in TASKS:
        seconds = []
        for _ in range(1 + a.calls):
            began = time.monotonic()
            found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
            seconds.append(time.monotonic() - began)
        figures |= {f"{task} cold, s": seconds[0], f"{task} warm, s": sum(seconds[1:]) / a.calls}
        results[task] = {k: v for k, v in found["results"][task].items() if isinstance(v, float)}
    print(json.dumps({"figures": figures, "results": results}))


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="default: a random Llama")
    parser.add_argument("--docs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--side", choices=("jaxtune", "hf"))
    parser.add_argument("--tasks")
    a = parser.parse_args()
    if a.side:
        return child(a)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if a.model:
            write_tasks(Path(folder), a.docs)
        else:
            write_tasks(Path(folder), a.docs, [f"w{i}" for i in range(2000)], start="")
            a.model = f"{folder}/model"
            common.make_llama(Path(a.model), **LLAMA)

        def side(name):
            flags = [f"--{k}={v}" for k, v in vars(a).items() if k in ("model", "docs", "calls", "threads")]
            command = [sys.executable, __file__, *flags, f"--batch-size={a.batch_size}", f"--tasks={folder}"]
            done = common.run([*command, f"--side={name}"], a.threads, JAXTUNE_CACHE=f"{folder}/cache")
            found = common.last_json(done.stdout)
            results[name] = found["results"]
            return found["figures"] | {"process, s": done.wall, "peak MiB": done.peak_mib}

        found = common.alternate({name: lambda name=name: side(name) for name in ("jaxtune", "hf")}, a.repeats)
    for task, values in results["hf"].items():
        print(task, {k: (v, results["jaxtune"][task][k]) for k, v in values.items()}, file=sys.stderr)
    metrics = [f"{task} {kind}, s" for task in TASKS for kind in ("cold", "warm")] + ["process, s"]
    ratios = {f"hf / jaxtune, {m}": (common.ratio(found, m, "hf", "jaxtune"), ">= 1") for m in metrics}
    common.report(f"lm_eval, {a.docs} documents a task", found, ratios, a.json)


if __name__ == "__main__":
    main()
