"""From what was measured to a decision: costs, break-even, the Pareto front, and one sentence with the reason."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.decide.candidates import PROMPT, TUNED, Outcome
from jaxtune.decide.learning import Curve
from jaxtune.decide.price import Price
from jaxtune.decide.race import compared, interval
from jaxtune.evaluate import statistics

THOUSAND = 1000
NOISE = 0.05  # the share of a cost by which measured seconds may differ
TUNE, KEEP = "tune", "keep the prompt"


class Cost(NamedTuple):
    """What a candidate costs, in a price's unit: 1,000 requests, and its training."""

    requests: float
    training: float


def cost(outcome: Outcome, price: Price, training: Price) -> Cost:
    """The cost of a candidate's requests and of its training."""
    requests = THOUSAND * price.of(outcome.read, outcome.written, outcome.seconds)
    took = outcome.training
    return Cost(requests, training.of(took["tokens"], 0.0, took["seconds"]) if took else 0.0)


def break_even(tuned: Cost, prompt: Cost) -> float | None:
    """After how many requests a training is paid by cheaper requests; None: they are not cheaper by NOISE or more."""
    saved = (prompt.requests - tuned.requests) / THOUSAND
    return tuned.training / saved if saved > NOISE * prompt.requests / THOUSAND else None


def break_even_by_answers(tuned: Cost, right: float, prompt: Cost, prompt_right: float) -> float | None:
    """After how many requests a right answer costs less than one of a prompt, training included; None: never.

    Args:
        tuned: the cost of the tuned model.
        right: the share of its answers that are right.
        prompt: the cost of the prompt.
        prompt_right: its share; of a prompt that is never right, no answer is cheaper.
    """
    if not prompt_right:
        return 0.0 if right else None
    saved = (prompt.requests * right / prompt_right - tuned.requests) / THOUSAND
    return tuned.training / saved if saved > 0 else None


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of (cost, score) no other point beats: as cheap and better, or cheaper and as good."""
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]


def best(outcomes: Sequence[Outcome], price: Price) -> Outcome | None:
    """The candidate with the best score of those that were measured on all rows; of equal ones the cheapest."""
    whole = [o for o in outcomes if o.stopped is None]
    return min(whole, key=lambda o: (-o.score, o.needs if o.side == TUNED else 0, cost(o, price, price)), default=None)


def settled(prompt: Outcome, worth: float) -> bool:
    """Whether a prompt leaves less to gain than is worth tuning, by the lower end of its interval."""
    low = interval(prompt.scores).low
    return low is not None and 1 - low < worth


def decide_between(
    outcomes: Sequence[Outcome], price: Price, training: Price, worth: float, curve: Curve | None = None
) -> dict[str, Any]:
    """Compare the best of both sides, as JSON.

    Args:
        outcomes: all that was measured.
        price: of requests.
        training: price of trainings, of the same unit.
        worth: the gain in score that is worth tuning.
        curve: the learning curve of LoRA.

    Returns:
        verdict (TUNE or KEEP), sentence, matrix (a row for each candidate), prompt and tuned (names of the best),
        difference, p and break_even.
    """
    prompt = best([o for o in outcomes if o.side != TUNED], price)
    tuned = best([o for o in outcomes if o.side == TUNED], price)
    costs = [cost(o, price, training) for o in outcomes]
    front = pareto([(c.requests, o.score) for c, o in zip(costs, outcomes, strict=True)])
    found: dict[str, Any] = {
        "prompt": prompt and prompt.name,
        "tuned": tuned and tuned.name,
        "matrix": [_row(o, c, f, prompt, price, training) for o, c, f in zip(outcomes, costs, front, strict=True)],
    }
    if tuned is None:
        return found | _without_tuned(prompt, worth)
    if prompt is None:
        score = _percent(interval(tuned.scores))
        return found | {"verdict": TUNE, "sentence": f"{tuned.what}: {score}; no prompt was measured beside it."}
    result = compared(prompt.scores, tuned.scores)
    spent = cost(tuned, price, training), cost(prompt, price, training)
    even, by_answers = break_even(*spent), break_even_by_answers(spent[0], tuned.score, spent[1], prompt.score)
    wins = result.p is not None and result.p < 1 - statistics.LEVEL and result.difference.value >= worth
    found |= {"difference": result.difference._asdict(), "p": result.p, "break_even": even}
    found["break_even_by_answers"] = by_answers
    sentence = _tune(tuned, prompt, result, even, by_answers) if wins else _keep(tuned, prompt, result, even, worth)
    if curve is not None:
        found["curve"] = _curve(curve, prompt)
    return found | {"verdict": TUNE if wins else KEEP, "sentence": sentence}


def _without_tuned(prompt: Outcome | None, worth: float) -> dict[str, Any]:
    if prompt is None:
        return {"verdict": KEEP, "sentence": "Nothing was measured on all rows."}
    score = interval(prompt.scores)
    sentence = f"{prompt.what}: {_percent(score)}; nothing was tuned."
    if settled(prompt, worth):
        sentence = (
            f"{prompt.what} answers {_percent(score)} right: tuning can gain {_points(1 - score.low)} at most, less "
            f"than the {_points(worth)} that are worth it: keep the prompt."
        )
    return {"verdict": KEEP, "sentence": sentence}


def _tune(tuned: Outcome, prompt: Outcome, result: Any, even: float | None, by_answers: float | None) -> str:
    if even is not None:
        pays = f"pays after {_count(even)} requests"
    elif not prompt.score:
        pays = "pays from its first right answer on, since the prompt has none"
    elif by_answers is not None:
        pays = f"pays after {_count(by_answers)} requests, counted by right answers; a request itself costs no less"
    else:
        pays = "a request costs no less, so that it pays by its answers alone"
    return f"{tuned.what}: {_gain(result)} over {_side(prompt)}, and {pays}: tune."


def _keep(tuned: Outcome, prompt: Outcome, result: Any, even: float | None, worth: float) -> str:
    if result.difference.value > 0 and result.p is not None and result.p < 1 - statistics.LEVEL:
        why = f"{tuned.what}: {_gain(result)} over {_side(prompt)}, less than the {_points(worth)} that are worth it"
    else:
        why = f"No evidence that tuning helps: {tuned.what} has {_gain(result)} against {_side(prompt)}"
    kept = "keep the prompt" if prompt.side == PROMPT else "keep the answers of the nearest rows"
    later = ""
    if even is not None and result.difference.low is not None and result.difference.low > -worth:
        later = f" Tuned, requests are cheaper, which pays after {_count(even)}."
    return f"{why}: {kept}.{later}"


def _side(prompt: Outcome) -> str:
    which = "the best prompt" if prompt.side == PROMPT else "the best without training"
    return f"{which} ({prompt.what}: {_percent(interval(prompt.scores))})"


def _row(
    outcome: Outcome, of: Cost, front: bool, prompt: Outcome | None, price: Price, training: Price
) -> dict[str, Any]:
    row = {key: value for key, value in outcome.as_json().items() if key != "scores"}
    row |= {"score": interval(outcome.scores)._asdict(), "measured_on": len(outcome.scores), "pareto": front}
    row |= {"cost_of_1000": of.requests, "cost_of_training": of.training}
    if prompt is not None and outcome is not prompt:
        result = compared(prompt.scores, outcome.scores)
        row |= {"difference": result.difference._asdict(), "p": result.p}
        if outcome.side == TUNED:
            row["break_even"] = break_even(of, cost(prompt, price, training))
    return row


def _curve(curve: Curve, prompt: Outcome) -> dict[str, Any]:
    """Its exponent, the score with twice and four times the rows, and the rows that equal a prompt."""
    if not curve.holds:
        return {"rows": curve.rows, "holds": False}
    low, high = (float(x) for x in _ends(curve.draws[:, 1]))
    more = {str(n * curve.rows[-1]): curve.score(n * curve.rows[-1])._asdict() for n in (2, 4)}
    steps = [curve.rows[0] * (4 * curve.rows[-1] / curve.rows[0]) ** (i / 24) for i in range(25)]
    found = {
        "rows": curve.rows,
        "holds": True,
        "exponent": {"value": curve.b, "low": low, "high": high},
        "with_more_rows": more,
        "line": [[n, *curve.score(n)] for n in steps],
    }
    if 0 < prompt.score < 1:
        needed = curve.rows_for(prompt.score)
        found["rows_to_equal_the_prompt"] = {k: v if math.isfinite(v) else None for k, v in needed._asdict().items()}
    return found


def _ends(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, [(1 - statistics.LEVEL) / 2, (1 + statistics.LEVEL) / 2])


def _gain(result: Any) -> str:
    difference = result.difference
    value = f"{100 * difference.value:+.1f} points"
    return value if difference.low is None else f"{value} [{100 * difference.low:.1f}, {100 * difference.high:.1f}]"


def _points(share: float) -> str:
    return f"{100 * share:.2g} points"


def _percent(score: Any) -> str:
    value = f"{100 * score.value:.1f}%"
    return value if score.low is None else f"{value} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _count(requests: float) -> str:
    """A number of requests, to two digits, rounded up."""
    size = 10 ** max(0, math.floor(math.log10(requests)) - 1) if requests >= 1 else 1
    return f"{math.ceil(requests / size) * size:,}"
