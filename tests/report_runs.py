"""Made-up runs for the tests of reports, and a strict reader of pages."""

import json
import re
from html.parser import HTMLParser

from jaxtune import config

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\ud800"
VOID = {"meta", "link", "img", "br"}
OVERRIDES = {
    "model": {"path": "models/tiny/base"},
    "tune": {"lora": {"r": 16}},
    "data": {"train": "data/train.jsonl", "eval": "data/eval.jsonl"},
    "train": {"steps": 40},
    "evaluate": {"metrics": ["json_valid", "json_exact"]},
}
SUMMARY = {
    "trainable": 2_500,
    "all": 100_000,
    "groups": {"mlp/up_proj": [2_500, 40_000], "embed": [0, 60_000]},
    "seconds": {"train": 70.0, "export": 22.0},
    "device": "TPU v9",
    "data": ["data/train.jsonl: 123 rows"],
    "samples": [
        {
            "prompt": "two red mugs",
            "expected": '{"n": 2, "c": "red"}',
            "before": "mugs",
            "after": '{"c": "red", "n": 2}',
        },
        {"prompt": "one blue mug", "expected": '{"n": 1, "c": "blue"}', "before": "", "after": '{"n": 1, "c": "pink"}'},
    ],
    "argv": ["jaxtune", "train", "--config=my config.py"],
}


def metrics(best=20):
    lines = [{"step": 0, "eval/json_valid": 0.0, "eval/json_exact": 0.0}, {"step": 0, "eval/loss": 3.5}]
    for step in range(1, 41):
        lines.append(
            {
                "step": step,
                "train/loss": 4 - step / 20,
                "train/lr": 1e-3,
                "train/grad_norm": 1.5,
                "train/tokens": step * 100,
                "train/tokens_per_second": 1234.0,
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "eval/loss": 1.25 if step == best else 2.0 + step / 100})
    return [*lines, {"step": 40, "eval/json_valid": 0.99, "eval/json_exact": 0.915}]


def make_run(folder, overrides=OVERRIDES, lines=None, summary=SUMMARY, tail=""):
    folder.mkdir(parents=True)
    resolved = config.resolve(overrides)
    (folder / "config.json").write_text(config.to_json(resolved, {"jaxtune": "0.1.0", "jax": "9.8.7"}))
    lines = metrics() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    if summary is not None:
        (folder / "adapter").mkdir()
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """Reads a page strictly: elements are closed in order. Keeps tags, rows of tables and text."""

    def __init__(self, file):
        super().__init__()
        self.open, self.tags, self.rows, self.texts, self.scripts = [], [], [], [], []
        self.starts = []  # of tables among the rows
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.starts.append(len(self.rows))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.tags[-1][1].get("type"), data))
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)
            if self.rows and {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def row(self, head):
        return next(row for row in self.rows if row[0] == head)

    def links(self):
        """Addresses beyond this page."""
        return [a["href"] for tag, a in self.tags if tag == "a" and not a["href"].startswith("#")]

    def charts(self):
        """Curves by name, as the read-out has them: {chart: {curve: {step: value}}}."""
        titles = re.findall(r"<figcaption><b>(.*?)</b>", self.source)
        data = [json.loads(text) for kind, text in self.scripts if kind == "application/json"]
        return {t: {s["name"]: dict(s["points"]) for s in d["series"]} for t, d in zip(titles, data, strict=True)}


# What `jaxtune data` writes of 40 rows with a limit of 64 tokens.
DATA = {
    "summary": {
        "sources": [{"name": "data/train.jsonl", "format": "prompt_completion", "split": "train", "rows": 40}],
        **{"rows": 40, "rows_trained": 36, "eval_rows": 4, "tokens": 1000, "trained_tokens": 250, "max_length": 64},
        **{"overlength": "drop", "over_limit": 4, "batch_used_padded": 0.5, "batch_used_packed": 0.975},
        **{"tokens_a_word": 1.25, "unknown_share": 0.0},
        "groups": {"language": [{"value": "en", "rows": 30}, {"value": "de", "rows": 6}]},
        "lengths": {"percentiles": {"50": 20, "100": 79}, "edges": [0, 20, 40, 60, 80], "counts": [10, 20, 6, 4]},
    },
    "findings": [
        {
            **{"check": "overlap", "severity": "error", "message": "2 rows (50.0%) of the evaluation data are known"},
            **{"fix": "leave them out", "rows": ["data/eval.jsonl:3 = data/train.jsonl:7"], "count": 2},
        },
        {
            "check": "length",
            "severity": "note",
            "message": "4 rows are long",
            "fix": "raise it",
            "rows": [],
            "count": 4,
        },
    ],
    "samples": [
        {"row": "data/train.jsonl:1", "pieces": [{"text": "Q ", "trained": False}, {"text": "A", "trained": True}]}
    ],
}
