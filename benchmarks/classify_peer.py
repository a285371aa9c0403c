"""What classify.py runs as a process of its own: plain transformers and peft, trained, or asked for labels.

    python benchmarks/classify_peer.py '{"do": "train", ...}'

The last line of what it prints is JSON.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from classify import MOST_TOKENS, Row, names_of, read
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

LORA = {"r": 16, "lora_alpha": 32}

# ---------------------------------------------------------------------------------------------------- models, in torch


class MeanPooled(BertForSequenceClassification):
    """transformers' class, with the mean over the text where it takes the first token."""

    def forward(self, input_ids, attention_mask, labels=None, **_):
        x = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask[..., None].to(x.dtype)
        logits = self.classifier(self.bert.pooler(((x * there).sum(1) / there.sum(1))[:, None]))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


CLASSES = {"texts": MeanPooled, "words": AutoModelForTokenClassification}


def fresh(model: Path, task: str, names: Sequence[str]) -> Any:
    """The encoder with a new head, in torch: as transformers' class has it, but texts are pooled by their mean."""
    settings = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return CLASSES[task].from_pretrained(model, **settings)


def tuned(folder: Path, model: Path, task: str, names: Sequence[str]) -> Any:
    """What a run of either side wrote: `folder/model`, or `folder/adapter` on the base."""
    if (folder / "adapter").exists():
        return PeftModel.from_pretrained(fresh(model, task, names), folder / "adapter")
    return CLASSES[task].from_pretrained(folder / "model")


class Encoded(NamedTuple):
    """A row's token ids and their labels' ids, -100 where there is none; of a text it is one id.

    Attributes:
        first: {place: word}, the first token of each word.
    """

    ids: list[int]
    label: Any
    first: dict[int, int]


def encode(rows: Sequence[Row], tokenizer: Any, names: Sequence[str]) -> list[Encoded]:
    """Words are labelled at their first token."""
    place = {name: i for i, name in enumerate(names)}
    words = isinstance(rows[0].text, list)
    found = tokenizer([row.text for row in rows], is_split_into_words=words, truncation=True, max_length=MOST_TOKENS)
    encoded = []
    for i, (row, ids) in enumerate(zip(rows, found["input_ids"], strict=True)):
        if not words:
            encoded.append(Encoded(ids, place[row.label], {}))
            continue
        of = found.word_ids(i)
        first = {at: word for at, word in enumerate(of) if word is not None and word not in of[:at]}
        encoded.append(
            Encoded(ids, [place[row.label[first[at]]] if at in first else -100 for at in range(len(of))], first)
        )
    return encoded


def batch(rows: Sequence[Encoded], pad: int = 0) -> dict[str, Any]:
    """Torch tensors, padded to the longest row."""
    width = max(len(row.ids) for row in rows)

    def padded(values, fill):
        return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values])

    labels = [row.label for row in rows]
    return {
        "input_ids": padded([row.ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "labels": padded(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels),
    }


# ----------------------------------------------------------------------------------------------------------- do


def train_peer(job: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Plain transformers and peft."""
    rows = read(Path(job["file"]))
    names = names_of(rows)
    rows = encode(rows, tokenizer, names)
    model = fresh(job["model"], job["task"], names)
    if job["method"] == "lora":
        linear = r".*encoder\.layer\..*\.(query|key|value|dense)"  # with the pooler, jaxtune's "all-linear"
        settings = {"target_modules": linear, "modules_to_save": ["pooler", "classifier"], "task_type": "SEQ_CLS"}
        model = get_peft_model(model, LoraConfig(**LORA, **settings))
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) == yes] for yes in (True, False))
    groups = [{"params": matrices, "weight_decay": job["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job["lr"])
    steps = json.loads(Path(job["order"]).read_text())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(len(steps)))
    model.train()
    seconds, tokens, losses = [], [], []
    for members in steps:
        began = time.perf_counter()
        loss = model(**batch([rows[i] for i in members])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(len(rows[i].ids) for i in members))
    model.save_pretrained(Path(job["out"]) / ("adapter" if job["method"] == "lora" else "model"))
    return {
        "trained": sum(p.numel() for p in trained),
        "all": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "tokens": tokens,
        "losses": losses,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def cosine(steps: int, warmup: float = 0.03):
    """configs/common.py's schedule, as a factor of the rate."""
    up = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / up) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - up) / (steps - up))))

    return factor


def ask(job: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The label that a tuned model gives to each row, or to each of its words."""
    rows = [Row(*row) for row in json.loads(Path(job["file"]).read_text())]
    names = job["names"]
    model = tuned(Path(job["out"]), job["model"], job["task"], names).eval()
    asked = encode(rows, tokenizer, names)
    said: list[Any] = [None] * len(rows)
    by_length = np.argsort([len(row.ids) for row in asked], kind="stable")
    with torch.no_grad():
        for at in range(0, len(rows), 64):
            members = by_length[at : at + 64].tolist()
            inputs = batch([asked[i] for i in members])
            inputs.pop("labels")
            best = model(**inputs).logits.argmax(-1)
            for i, ids in zip(members, best.tolist()):
                said[i] = ids if job["task"] == "texts" else _of_words(ids, asked[i].first, len(rows[i].text))
    found = [model.config.id2label[i] for i in range(len(names))]
    if found != names:
        raise SystemExit(f"the labels of {job['out']} are {found}, not {names}")
    return {"said": said}


def _of_words(ids: Sequence[int], first: dict[int, int], count: int) -> list[int]:
    """Of each word the label at its first token; a word that the tokenizer drops has the first label, O."""
    labels = [0] * count
    for at, word in first.items():
        labels[word] = ids[at]
    return labels


def main() -> None:
    """Train as the peer, or ask a tuned model for labels; print one line of JSON."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    print(json.dumps({"train": train_peer, "ask": ask}[job["do"]](job, tokenizer)))


if __name__ == "__main__":
    main()
