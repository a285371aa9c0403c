"""`decide`: measure the candidates one after another, resume where a killed decision stood, and decide."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import config, data
from jaxtune.config.recipe import compute_dtype, open_model
from jaxtune.curate.overlap import unshared
from jaxtune.data.tokenize import Encoder
from jaxtune.decide import examples, tuning, verdict
from jaxtune.decide.candidates import PROMPT, TUNED, Answerer, Outcome, Questions, answered, nearest_answers
from jaxtune.decide.learning import Curve, fit
from jaxtune.decide.price import SECONDS, Price
from jaxtune.errors import UserError, nearest
from jaxtune.evaluate import asks as rows_as
from jaxtune.evaluate.asks import Ask, Instruction
from jaxtune.evaluate.evaluation import tuning_rows
from jaxtune.evaluate.kept import Kept, key_of
from jaxtune.evaluate.metrics import METRICS, RIGHT, Metric, choose
from jaxtune.evaluate.systems import System, identity
from jaxtune.files import atomic_write_text
from jaxtune.hf import load as hf
from jaxtune.infer.logprobs import worth_a_compile
from jaxtune.infer.source import check_reads_one_text
from jaxtune.objectives.task import DEFAULT_LENGTH

VERSION = 2  # raise it when a candidate is measured otherwise
KINDS = ("prompts", "random", "similar", "balanced", "labels", "neighbours", "lora", "head", "soft-prompt")
MOST_HELD_OUT = 1 / 3  # of the rows, where data.eval_fraction is not set
VOTES = 8  # training rows that answer together
PASSES_OF_A_HEAD = 20.0
RATES = (1.0, 4.5, 20.0)  # of the default learning rate, tried where none is set


@dataclass(frozen=True)
class Options:
    """The options of a decision, named as the flags of `jaxtune decide`.

    Attributes:
        prompts: files of instructions.
        shots: examples in a prompt.
        candidates: some of KINDS; None: those that apply.
        metric: of `evaluate.metrics.METRICS`; None: the one that fits.
        rows: held-out rows at most.
        sizes: rows that LoRA is tuned on; None: a sixteenth, a quarter and all.
        price, training_price: of requests and of trainings.
        worth: the gain in score that is worth tuning.
        encoder: finds similar rows; None: BM25 does.
        max_new_tokens: longest answer; None: 1.25 times the longest expected one.
        batch_size: rows that are answered together.
        budget: seconds; candidates that would not fit are left out.
        forgetting: files with general text, on which tuned models that continue text are measured, too.
    """

    prompts: Sequence[Path] = ()
    shots: int = 4
    candidates: Sequence[str] | None = None
    metric: str | None = None
    rows: int = 200
    sizes: Sequence[int] | None = None
    price: Price = SECONDS
    training_price: Price | None = None
    worth: float = 0.02
    encoder: Path | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    budget: float | None = None
    forgetting: Sequence[str] = ()


class Planned(NamedTuple):
    """A candidate that is to be measured, with the seconds it may take."""

    kind: str
    name: str
    seconds: float


@dataclass
class Material:
    """What a decision is made on.

    Attributes:
        held: the held-out rows that all candidates answer.
        pool: the others, in an order of chance.
        labels: the answers, where they are labels.
        names: label names of a task with labels; (): answers are texts.
        lines: sentences on both.
    """

    held: list[Ask]
    pool: list[Ask]
    labels: tuple[str, ...]
    lines: list[str] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """A hash of the rows."""
        return key_of([[ask.digest for ask in part] for part in (self.held, self.pool)])


def split(asks: Sequence[Ask], held: Sequence[Ask] | None, fraction: float, most: int) -> Material:
    """Hold rows out by a hash of their content; equal rows are never on both sides.

    Args:
        asks: the rows of data.train.
        held: those of data.eval; None: a fraction of the others.
        fraction: held out where `held` is None; 0: as many as `most`, but a third at most.
        most: held-out rows.

    Raises:
        UserError: nothing is left on one side.
    """
    digests = np.array([ask.digest for ask in asks], np.uint64)
    lines = []
    if held is None:
        out = data.held_out(digests, fraction or min(MOST_HELD_OUT, most / len(digests)))
        held, asks = [a for a, o in zip(asks, out) if o], [a for a, o in zip(asks, out) if not o]
        lines.append(f"{len(held):,} of {len(digests):,} rows are held out, by a hash of their content")
    else:
        known = {ask.digest for ask in held}
        left = [ask for ask in asks if ask.digest not in known]
        if len(left) < len(asks):
            lines.append(f"{len(asks) - len(left):,} training rows are also held out, and are left out of training")
        asks = left
    if not held or not asks:
        raise UserError(
            f"decide needs rows to tune on and rows held out; here are {len(asks):,} and {len(held):,}. "
            "Give more rows, or --eval=FILE."
        )
    # The lowest digests were held out, so a second hash decides the order.
    chance = lambda ask: key_of(ask.digest)  # noqa: E731
    held, pool = sorted(held, key=chance)[:most], sorted(asks, key=chance)
    return Material(held, pool, rows_as.labels_of([*held, *pool]), lines)


class Decision:
    """A decision in its folder.

    Attributes:
        outcomes: what was measured.
    """

    def __init__(self, cfg: Any, options: Options, out: Path, say: Callable[[str], None] = print):
        """Read model and data, and check everything.

        Raises:
            UserError: the data, the model or the options are wrong.
        """
        self.cfg, self.options, self.out, self.say = cfg, options, out, say
        self.folder = hf.resolve(cfg.model.path)
        check_reads_one_text(self.folder, "jaxtune decide")
        self.labelled = cfg.objective.name == "sequence_classification"
        if cfg.objective.name not in ("causal_lm", "sequence_classification"):
            raise UserError(f"objective.name={cfg.objective.name}: decide compares answers (causal_lm) or labels.")
        if wrong := next((kind for kind in options.candidates or () if kind not in KINDS), None):
            raise UserError(f"--candidates={wrong}: unknown.{nearest(wrong, KINDS)} Known: {', '.join(KINDS)}.")
        self.module, task = open_model(cfg, self.folder)
        self.body = getattr(self.module, "body", self.module)
        self.continues = not self.body.is_encoder
        self.tokenizer = data.load_tokenizer(cfg.model.tokenizer, cfg.model.chat_template, cfg.data.date)
        self.instructions = [Instruction(), *map(rows_as.read_instruction, options.prompts)]
        if options.prompts and not self.continues:
            raise UserError(f"--prompt has no effect: {cfg.model.path} is an encoder, which continues no text.")
        if options.encoder is not None:
            examples.check_encoder(options.encoder)
        self._check_general()
        self.material = self._material(task)
        for line in self.material.lines:
            say(line)
        self.metric_name, metric = self._metric()
        self.questions = Questions(
            self.material.held,
            metric,
            self.tokenizer,
            Encoder(self.tokenizer, cfg.data.allow_left_out or ()),
            self.module.spec.positions,
            self._longest(),
        )
        every = [ask.answer for ask in (*self.material.held, *self.material.pool)]
        self.stop = rows_as.BETWEEN if any("\n" in answer for answer in every) else "\n"
        self.outcomes: list[Outcome] = []
        self.began = time.monotonic()
        self.planned = list(self._plan())
        self._check_lengths()

    def _check_general(self) -> None:
        """Refuse general text that cannot be read, is tuning data, or that no candidate is measured on."""
        if not self.options.forgetting:
            return
        if self.labelled or not self.continues:
            raise UserError(
                "--forgetting has no effect: models tuned on this task predict labels and continue no text."
            )
        rows, _, _ = data.prepare(
            self.tokenizer,
            list(self.options.forgetting),
            max_length=min(self.module.spec.positions, DEFAULT_LENGTH),
            overlength="split",
            vocab_size=self.module.spec.vocab,
        )
        for line in unshared(data.Rows.concatenate(rows), tuning_rows(self.cfg, self.tokenizer), self.tokenizer)[1]:
            self.say(line)

    def _material(self, task: Any) -> Material:
        d = self.cfg.data

        def read(sources):
            if self.labelled:
                return rows_as.read_labelled(sources, task.form, bool(self.tokenizer.chat_template))
            reading = data.reading(d)
            del reading["allow_left_out"]
            return rows_as.read_asks(sources, self.tokenizer, **reading)

        held = read(d.eval) if d.eval else None
        return split(read(d.train), held, d.eval_fraction, self.options.rows)

    def _metric(self) -> tuple[str, Metric]:
        """The metric that candidates are compared by."""
        asked = self.options.metric
        if self.material.labels or self.labelled:
            if asked not in (None, "exact_match"):
                raise UserError(f"--metric={asked} has no effect: the answers are labels, which are right or wrong.")
            return "exact_match", METRICS["exact_match"]._replace(label="accuracy")
        references = [ask.answer for ask in self.material.held]
        fits = choose([asked] if asked else None, references, "--metric")
        name = asked or next(name for name in RIGHT if name in fits)
        if not fits[name].share or fits[name].better < 0:
            raise UserError(f"--metric={name}: expected a score from 0 to 1 of which more is better.")
        return name, fits[name]

    def _longest(self) -> int:
        if self.options.max_new_tokens:
            return self.options.max_new_tokens
        answers = [ask.answer for ask in (*self.material.held, *self.material.pool[:1000])]
        longest = max(map(len, self.tokenizer(answers, add_special_tokens=False)["input_ids"])) + 1
        return longest + max(4, longest // 4)

    def _check_lengths(self) -> None:
        """Refuse prompts that leave no room for an answer before anything is loaded."""
        if self.continues and self._asked("prompts"):
            for instruction in self.instructions:
                self.questions.rows(instruction)

    # -------------------------------------------------------------------------------------------------------- the plan

    def _asked(self, kind: str) -> bool:
        """Whether candidates of a kind are wanted and apply."""
        texts = self.continues
        applies = {
            "balanced": texts and bool(self.material.labels),
            "labels": texts and bool(self.material.labels),
            "neighbours": bool(self.material.labels),
            "head": bool(self.material.labels),
            "soft-prompt": texts and not self.labelled,
            "lora": True,
        }.get(kind, texts)
        wanted = self.options.candidates is None or kind in self.options.candidates
        return applies and wanted and not (kind in ("random", "similar", "balanced") and not self.options.shots)

    def _plan(self) -> Iterator[Planned]:
        """The candidates with rough times, by their tokens."""
        speed = worth_a_compile(self.module.abstract_params()) / 0.7  # tokens a second
        count = len(self.material.held)
        length = np.mean([len(ids) for ids in self.tokenizer([a.text for a in self.material.held])["input_ids"]])
        new = self.questions.max_new_tokens

        def answering(read: float) -> float:
            return 8.0 + count * (read + 6 * new) / speed

        for instruction in self.instructions if self._asked("prompts") else ():
            yield Planned("prompts", _prompt_name(instruction), answering(length))
        for kind in ("random", "similar", "balanced"):
            if self._asked(kind):
                yield Planned(kind, self._shots_name(kind), answering((1 + self.options.shots) * (length + new)))
        if self._asked("labels"):
            yield Planned("labels", "likeliest label", answering(len(self.material.labels) * 4 + length))
        if self._asked("neighbours"):
            read = 0.0 if self._encoder() is None else (len(self.material.pool) + count) * length
            yield Planned("neighbours", self._neighbours_name(), 2.0 + 0.002 * count + read / speed)
        if self._asked("lora"):
            for rows in self._sizes():
                yield Planned(
                    "lora", f"LoRA on {rows:,} rows", self._training(rows, length + new, speed) + answering(0)
                )
        if self._asked("head"):
            read = PASSES_OF_A_HEAD if self.continues else 1.0
            yield Planned("head", "head", 15.0 + len(self.material.pool) * length * read / 3 / speed)
        if self._asked("soft-prompt"):
            rows = len(self.material.pool)
            yield Planned("soft-prompt", "soft prompt", self._training(rows, length + new, speed) + answering(0))

    def _training(self, rows: int, length: float, speed: float) -> float:
        t, pool = self.cfg.train, len(self.material.pool)
        share = max(tuning.LEAST, rows / pool)
        lines = self.module.spec.positions if self.cfg.data.max_length is None else self.cfg.data.max_length
        a_row = lines if self.cfg.data.packing else length
        tokens = t.steps * t.batch_size * a_row if t.steps else t.epochs * pool * length
        return 12.0 + 4 * share * tokens / speed

    def _sizes(self) -> list[int]:
        return tuning.sizes(len(self.material.pool), self.options.sizes)

    def _shots_name(self, kind: str) -> str:
        how = {"random": "at random", "similar": f"similar by {self._by()}", "balanced": "of each label"}[kind]
        return f"{self.options.shots} examples {how}"

    def _neighbours_name(self) -> str:
        return f"vote of {VOTES} nearest rows by {self._by()}"

    def _by(self) -> str:
        return "BM25" if self._encoder() is None else self._encoder().name

    def _encoder(self) -> Path | None:
        """The encoder that finds similar rows: the user's, or the model itself if it is one."""
        return self.options.encoder or (None if self.continues else self.folder)

    def show_plan(self) -> None:
        """Say what will be measured, and how long it may take."""
        total = sum(p.seconds for p in self.planned)
        self.say(
            f"{len(self.planned)} candidates on {len(self.material.held):,} held-out rows, {len(self.material.pool):,} "
            f"rows to tune on or to show, by {self.questions.metric.label}; about {_time(total)} on this machine:"
        )
        for planned in self.planned:
            self.say(f"  {planned.name:<44} {_time(planned.seconds)}")

    # ------------------------------------------------------------------------------------------------------- measuring

    def measure(self) -> list[Outcome]:
        """Measure all candidates, or find what an earlier run has measured."""
        with Kept(self.out / "kept.jsonl") as answers, Kept(self.out / "candidates.jsonl") as kept:
            self.answers, self.kept = answers, kept
            self.spent = self.foreseen = self.done = 0.0
            if self.continues and any(self._asked(kind) for kind in KINDS[:5]):
                self._prompts()
            if self._asked("neighbours"):
                self._take(self._neighbours_name(), "neighbours", self._neighbours, [str(self._encoder())])
            best = self._best(PROMPT)
            if best is not None and verdict.settled(best, self.options.worth):
                self.say(f"Nothing is tuned: {verdict._without_tuned(best, self.options.worth)['sentence']}")
                return self.outcomes
            self._tuned()
        return self.outcomes

    def _best(self, side: str | None = None) -> Outcome | None:
        return verdict.best([o for o in self.outcomes if side in (None, o.side)], self.options.price)

    def _take(self, name: str, kind: str, measure: Callable[[Any], Outcome], key: Sequence[Any]) -> Outcome | None:
        """Measure a candidate unless it is stored, and say what came out; None: no time is left for it."""
        planned = next((p for p in self.planned if p.name == name or p.kind == kind == "head"), None)
        expected = planned.seconds if planned else 0.0
        whole = key_of(VERSION, name, self._identity, self.material.identity, self.metric_name, *key)
        passed = time.monotonic() - self.began
        if whole in self.kept.records:
            outcome, how = Outcome(**self.kept.records[whole]), "measured before"
        else:
            budget = self.options.budget
            if budget is not None and passed + expected > budget:
                self.say(f"{name}: left out, since about {_time(expected)} do not fit into what is left of --budget")
                return None
            leader = self._best()
            began = time.monotonic()
            outcome = measure(leader and leader.scores)
            took = time.monotonic() - began
            outcome.took = round(took, 2)
            how, self.spent, self.foreseen = _time(took), self.spent + took, self.foreseen + expected
            self.kept.add([(whole, outcome.as_json())])
        self.outcomes.append(outcome)
        self.done += expected
        left = sum(p.seconds for p in self.planned) - self.done
        pace = self.spent / self.foreseen if self.foreseen else 1.0
        score = verdict._percent(verdict.interval(outcome.scores))
        stopped = f", {outcome.stopped}" if outcome.stopped else ""
        eta = f"; about {_time(left * pace)} left" if left > 1 else ""
        self.say(f"[{len(self.outcomes)}/{len(self.planned)}] {name}: {score}{stopped} ({how}{eta})")
        return outcome

    @property
    def _identity(self) -> list[str]:
        if not hasattr(self, "_hashed"):
            m = self.cfg.model
            self._hashed = [identity(self.folder), str(compute_dtype(m.dtype)), m.quantization]
        return self._hashed

    def _prompts(self) -> None:
        """Prompts and examples, with the base in memory."""
        from jaxtune.hf.stops import named_ids

        dtype, quantization = compute_dtype(self.cfg.model.dtype), self.cfg.model.quantization
        base: list[System] = []  # loaded when it is needed first
        stops = named_ids(self.tokenizer, self.folder, None)

        def system() -> System:
            if not base:
                module, params = hf.load(
                    self.folder, dtype=dtype, quantization=None if quantization == "none" else quantization
                )
                base.append(System("base", module, params, key_of(*self._identity)))
            return base[0]

        def ask(
            name: str, kind: str, instruction: Instruction, shots: Any = None, labels: bool = False
        ) -> Outcome | None:
            if not (kind == "labels" or self._asked(kind)):
                return None

            def measure(leader):
                q, pool = self.questions, self.material.pool
                tokens = q.label_tokens(self.material.labels, instruction) if labels else {}
                answerer = Answerer(
                    *(system(), self.tokenizer, self.answers, q.max_new_tokens, stops, self.stop, tokens),
                    batch_size=self.options.batch_size,
                )
                rows = q.rows(instruction, shots and shots())
                return answered(name, PROMPT, name, q, rows, answerer, leader, needs=len(pool) if shots else 0)

            parts = [instruction.text, kind, self.options.shots if shots else 0, labels, str(self._encoder())]
            return self._take(name, kind, measure, [*parts, self.questions.max_new_tokens])

        for instruction in self.instructions:
            ask(_prompt_name(instruction), "prompts", instruction)
        best = self._best(PROMPT)
        by_name = {_prompt_name(i): i for i in self.instructions}
        chosen = by_name[best.name] if best else self.instructions[-1]
        for kind in ("random", "similar", "balanced"):
            ask(self._shots_name(kind), kind, chosen, lambda kind=kind: self._shots(kind))
        if self._asked("labels"):
            shown = next(
                (
                    kind
                    for kind in ("similar", "balanced", "random")
                    if self._best(PROMPT) and self._best(PROMPT).name == self._shots_name(kind)
                ),
                None,
            )
            ask("likeliest label", "labels", chosen, shown and (lambda: self._shots(shown)), labels=True)

    def _shots(self, kind: str) -> Callable[[Ask], list[Ask]]:
        """How the examples of a prompt are chosen; the most similar one stands last."""
        pool, k = self.material.pool, self.options.shots
        if kind == "similar":
            search = self._search()
            return lambda ask: [pool[i] for i, _ in reversed(search(ask.text, k))]
        fixed = (
            examples.balanced([a.answer for a in pool], k) if kind == "balanced" else examples.at_random(len(pool), k)
        )
        return lambda ask: [pool[i] for i in fixed]

    def _search(self) -> examples.Search:
        texts = [ask.text for ask in self.material.pool]
        folder = self._encoder()
        return examples.bm25(texts) if folder is None else examples.encoder(folder, texts)

    def _neighbours(self, leader: Any) -> Outcome:
        name, answers = self._neighbours_name(), [ask.answer for ask in self.material.pool]
        return nearest_answers(name, name, self.questions, self._search(), answers, VOTES)

    # ---------------------------------------------------------------------------------------------------------- tuning

    def _tuned(self) -> None:
        sizes = self._sizes() if self._asked("lora") else []
        values = self._rate(sizes[0]) if sizes else {}
        for rows in sizes:
            self._train("lora", f"LoRA on {rows:,} rows", rows, {"tune__method": "lora", **values})
        if self._asked("head"):
            rows = len(self.material.pool)
            self._train("head", f"head on {rows:,} rows", rows, self._of_head())
        if self._asked("soft-prompt"):
            prompt, tuned = self._best(PROMPT), self._best(TUNED)
            if prompt and tuned and verdict.compared(prompt.scores, tuned.scores).difference.low > 0:
                self.say("soft prompt: left out, since LoRA has won against the best prompt")
                return
            rows = len(self.material.pool)
            rate = {"tune__method": "prompt_tuning", "optim__lr": config.DEFAULT_LR["prompt_tuning"]}
            self._train("soft-prompt", "soft prompt", rows, rate)

    def _of_head(self) -> dict[str, Any]:
        """The settings of a head over the frozen model, for texts that continue too."""
        values: dict[str, Any] = {"tune__method": "head", "optim__lr": config.DEFAULT_LR["head"]}
        values |= {"train__steps": None, "train__epochs": PASSES_OF_A_HEAD, "data__packing": False}
        if not self.labelled:
            values |= {"objective__name": "sequence_classification", "data__columns": {}, "data__template": None}
            values |= {"data__format": "auto", "data__completion_from": None, "data__prompt_from": None}
        return values

    def _train(self, kind: str, name: str, rows: int, values: dict[str, Any]) -> None:
        """Train a run on some rows, and measure it."""
        pool = self.material.pool
        labels = kind == "head" or self.labelled
        write = rows_as.labelled_lines if labels and not self.labelled else rows_as.lines
        part = "labels" if labels and not self.labelled else "rows"
        asks = tuning.asks_of(pool, rows)
        file = tuning.subset(self.out / "data", f"{part}-{rows}.jsonl", write(asks))
        if labels:
            values = values | {"objective__labels": self.material.labels}
            if self.cfg.data.overlength == "drop":
                values |= {"data__overlength": "truncate"}
        if kind != "head":
            cfg = tuning.config_for(self.cfg, file, rows, len(pool), **values)
        else:
            cfg = config.replaced(self.cfg, tuning.NOT_MEASURED | {"data.train": (str(file),)} | _dotted(values))
        workdir = self.out / "runs" / f"{kind}-{rows}"

        def measure(leader):
            tuning.train(cfg, workdir)
            if labels:
                held = tuning.subset(self.out / "data", f"held-out-{part}.jsonl", write(self.material.held))
                columns = dict(self.cfg.data.columns) if self.labelled else None
                return tuning.measure_labels(name, name, workdir, rows, self.questions, held, columns)
            outcome = tuning.measure_text(
                *(name, name, workdir, rows, self.questions, self.answers, self.stop, leader),
                batch_size=self.options.batch_size,
            )
            if general:
                outcome.forgetting = tuning.forgotten(workdir, general, self.options.rows)
            return outcome

        general = self.options.forgetting
        key = [config.to_json(config.replaced(cfg, {"data.train": None})), key_of([a.digest for a in asks])]
        self._take(name, kind, measure, [*key, *([self.options.rows, *map(str, general)] if general else [])])

    def _rate(self, rows: int) -> dict[str, Any]:
        """The learning rate of LoRA: the config's, or the best of three on the fewest rows, by a fifth of them."""
        if "optim.lr" in dict(config.overrides(self.cfg)):
            return {"optim__lr": self.cfg.optim.lr}
        losses, pool = {}, self.material.pool
        file = tuning.subset(self.out / "data", f"rows-{rows}.jsonl", rows_as.lines(tuning.asks_of(pool, rows)))
        for factor in RATES:
            rate = float(f"{factor * config.DEFAULT_LR['lora']:.2g}")
            cfg = tuning.config_for(self.cfg, file, rows, len(pool), optim__lr=rate, tune__method="lora")
            cfg = config.replaced(cfg, {"data.eval_fraction": 0.2})
            workdir = self.out / "runs" / f"rate-{rate:g}"
            tuning.train(cfg, workdir)
            losses[rate] = tuning.eval_loss(workdir)
        best = min(losses, key=losses.__getitem__)
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        self.say(f"optim.lr={best:g} for LoRA, by the loss on a fifth of {rows:,} rows ({tried})")
        return {"optim__lr": best}

    # ---------------------------------------------------------------------------------------------------- the decision

    def curve(self) -> Curve | None:
        """The learning curve of LoRA, on the rows that all sizes were measured on."""
        found = [o for o in self.outcomes if o.side == TUNED and o.name.startswith("LoRA on ")]
        if not found:
            return None
        n = min(len(o.scores) for o in found)
        return fit([o.needs for o in found], np.array([o.scores[:n] for o in found]))

    def report(self) -> dict[str, Any]:
        """decision.json."""
        price, training = self.options.price, self.options.training_price or self.options.price
        found = verdict.decide_between(self.outcomes, price, training, self.options.worth, self.curve())
        notes = [
            "All candidates answered the same held-out rows; differences are paired. The best prompt and the "
            "best tuned model were chosen by their score on these rows, which favours both alike.",
            "A candidate was compared with the leader after a quarter, half and all rows, at a third of the 5% level "
            "each, and stopped where it was behind.",
        ]
        unmeasured = any(o.side == TUNED and o.forgetting is None for o in self.outcomes)
        if unmeasured and self.continues and not self.labelled and not self.options.forgetting:
            notes.append("What tuning cost outside the task was not measured; --forgetting=FILE measures it.")
        if price == SECONDS:
            notes.append("No price was given: costs are seconds on this machine.")
        elif price.second == 0 and self.options.training_price is None:
            notes.append("Training is priced as its tokens are read; give --training-price for another price.")
        return {
            "sentence": found.pop("sentence"),
            "verdict": found.pop("verdict"),
            "model": str(self.cfg.model.path),
            "data": [str(name) for name in self.cfg.data.train],
            "held_out": len(self.material.held),
            "pool": len(self.material.pool),
            "metric": self.questions.metric.label,
            "price": price._asdict(),
            "worth": self.options.worth,
            "device": jax.devices()[0].device_kind,
            "seconds": round(sum(o.took for o in self.outcomes), 1),
            **found,
            "notes": notes,
        }


def decide(cfg: Any, out: Path, options: Options = Options(), say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure prompts and tuned models on the same held-out rows, and decide; a decision that was killed goes on.

    Args:
        cfg: a resolved config: the model, the data, and how LoRA is tuned.
        out: folder for decision.json, decision.html, runs/ and what is measured.
        options: of the decision.
        say: called with each line on the plan and the progress.

    Returns:
        decision.json.

    Raises:
        UserError: the model, the data or the options are wrong.
    """
    from jaxtune.report.decision import write_decision
    from jaxtune.train.runtime import prepare_jax

    prepare_jax()
    decision = Decision(cfg, options, out, say)
    decision.show_plan()
    decision.measure()
    report = decision.report()
    atomic_write_text(out / "decision.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_decision(out)
    return report


def _prompt_name(instruction: Instruction) -> str:
    return f"prompt {instruction.name!r}" if instruction.text else "rows as they are"


def _dotted(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in values.items()}


def _time(seconds: float) -> str:
    from jaxtune.report.words import duration

    return duration(seconds)
