"""A whole job, from the command to the adapter on disk, against plain transformers and peft.

    python benchmarks/job.py --peer=PEFT_SFT.py --model=DIR --data=FILE.jsonl [--prompt=question --completion=answer]

Each side is a process of its own, in turn, and goes once over the same rows: `--steps` batches of those that fit in
`--max-length`. jaxtune runs with everything a user gets (checkpoints, TensorBoard, the report page): cold, with no
token or compilation cache, and warm, with both. The peer pads to the longest row of a batch in the order they come; one
more run of ours, which is not compared, groups rows by length.
"""

import json
import sys
import tempfile
from pathlib import Path

import common

GROUPED = "--config.data.group_by_length=True"


def fitting_rows(a, out: Path) -> int:
    """Copy the first rows that fit, enough for the run; return their tokens as the peer counts them.

    Raises:
        SystemExit: there are not enough.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    kept, tokens = [], 0
    for line in Path(a.data).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row[a.prompt] + "\n").input_ids
        completion = tokenizer(row[a.completion], add_special_tokens=False).input_ids
        length = len(prompt) - (prompt[-1] == tokenizer.eos_token_id) + len(completion) + 1
        if length <= a.max_length:
            kept.append(line)
            tokens += length
        if len(kept) == a.steps * a.batch:
            out.write_text("\n".join(kept) + "\n")
            return tokens
    raise SystemExit(f"{a.data} has {len(kept)} rows of at most {a.max_length} tokens; {a.steps * a.batch} are needed.")


def ours(data: Path, folder: Path, cache: Path, tokens: int, a, *more: str) -> dict[str, float]:
    workdir = Path(tempfile.mkdtemp(dir=folder))
    end = common.run(
        common.jaxtune(
            "train",
            f"--config={common.ROOT}/configs/lora_sft.py",
            f"--workdir={workdir}",
            f"--config.model.path={a.model}",
            f"--config.data.train={data}",
            f"--config.data.columns=prompt={a.prompt},completion={a.completion}",
            f"--config.data.max_length={a.max_length}",
            f"--config.train.batch_size={a.batch}",
            "--config.train.epochs=none",
            f"--config.train.steps={a.steps}",
            *more,
        ),
        a.threads,
        JAXTUNE_CACHE=str(cache),
    )
    adapter = workdir / "adapter" / "adapter_model.safetensors"
    trained = max(m.get("train/tokens", 0) for m in common.read_metrics(workdir))
    # The seam of prompt and completion is tokenised apart on one side and together on the other: a token here or there.
    if not adapter.exists() or abs(trained - tokens) > 0.01 * tokens:
        raise SystemExit(f"jaxtune trained on {trained} tokens, not {tokens}, or wrote no {adapter}")
    return _values(end, trained)


def theirs(data: Path, folder: Path, tokens: int, a) -> dict[str, float]:
    command = [sys.executable, a.peer, a.model, data, tempfile.mkdtemp(dir=folder), "--prompt", a.prompt]
    command += ["--completion", a.completion, "--steps", a.steps, "--batch", a.batch]
    return _values(common.run([*command, "--max-length", a.max_length, "--threads", a.threads], a.threads), tokens)


def _values(end: common.Finished, tokens: int) -> dict[str, float]:
    return {"wall, s": end.wall, "processor, s": end.cpu, "peak MiB": end.peak_mib, "tokens": tokens}


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--peer", required=True, help="the script of the other side")
    p.add_argument("--model", required=True, help="a model directory")
    p.add_argument("--data", required=True, help="a jsonl file")
    p.add_argument("--prompt", default="question")
    p.add_argument("--completion", default="answer")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--max-length", type=int, default=512)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, warm = folder / "rows.jsonl", folder / "warm"
        tokens = fitting_rows(a, data)
        ours(data, folder, warm, tokens, a)  # fills the cache

        def empty() -> Path:
            return Path(tempfile.mkdtemp(dir=folder))

        sides = {
            "jaxtune, cold cache": lambda: ours(data, folder, empty(), tokens, a),
            "jaxtune, warm cache": lambda: ours(data, folder, warm, tokens, a),
            "jaxtune, cold, rows grouped by length": lambda: ours(data, folder, empty(), tokens, a, GROUPED),
            "peft": lambda: theirs(data, folder, tokens, a),
        }
        found = common.alternate(sides, a.repeats)
    ratios = {
        "wall, cold": (common.ratio(found, "wall, s", "jaxtune, cold cache", "peft"), "<= 0.8"),
        "wall, warm": (common.ratio(found, "wall, s", "jaxtune, warm cache", "peft"), "below cold"),
        "peak memory": (common.ratio(found, "peak MiB", "jaxtune, cold cache", "peft"), "<= 1.0"),
    }
    title = f"Whole job: {a.steps} steps of {a.batch} rows, max_length {a.max_length}, {Path(a.model).name}"
    common.report(title, found, ratios, a.json)


if __name__ == "__main__":
    main()
