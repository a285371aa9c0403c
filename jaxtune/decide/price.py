"""What requests and training cost: by the token, by the hour of a machine, or in seconds where no price is known."""

import re
from typing import NamedTuple

from jaxtune.errors import UserError

EXAMPLES = "'0.2 USD per 1M tokens', '0.2 USD per 1M input tokens, 0.6 USD per 1M output tokens' or '2.5 USD per hour'"
SIZES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
AMOUNT = r"(?P<amount>\d+(?:\.\d+)?) *(?P<unit>[A-Za-z]{3}|[€$£])"
TOKENS = re.compile(
    rf"{AMOUNT} *(?:per|/) *(?P<size>[1-9]\d*(?:\.\d+)?)? *(?P<times>[kKmMbB]?) *"
    r"(?P<side>input|output)? *(?P<token>tokens?)"
)
HOURS = re.compile(rf"{AMOUNT} *(?:per|/) *(?:hour|h)")


class Price(NamedTuple):
    """A price in `unit`; by the token, or by the second of a machine.

    Attributes:
        unit: of money; "s" where seconds themselves are the price.
        read, written: of a token.
        second: of a second.
    """

    unit: str
    read: float = 0.0
    written: float = 0.0
    second: float = 0.0

    def of(self, read: float, written: float, seconds: float) -> float:
        """The cost of `read` and `written` tokens that take `seconds`."""
        return self.read * read + self.written * written + self.second * seconds


SECONDS = Price("s", second=1.0)  # no price: what it takes on this machine


def parse_price(text: str, flag: str = "--price") -> Price:
    """Read a price with its unit.

    Args:
        text: such as "0.2 USD per 1M tokens", "0.2 USD per 1M input tokens, 0.6 USD per 1M output tokens" or
            "2.5 USD per hour".
        flag: the option that gave it, for errors.

    Raises:
        UserError: it has no unit, or is not of this form.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and (hour := HOURS.fullmatch(parts[0])):
        return Price(hour["unit"].upper(), second=float(hour["amount"]) / 3600)
    found = [TOKENS.fullmatch(part) for part in parts]
    sides = [match["side"] for match in found if match]
    if re.fullmatch(r"[\d.]+", text.strip()):
        raise UserError(f"{flag}={text}: a price needs a unit: {EXAMPLES}.")
    unsized = any(m and m["token"] == "tokens" and not (m["size"] or m["times"]) for m in found)  # of how many?
    if None in found or unsized or sorted(map(str, sides)) not in (["None"], ["input", "output"]):
        raise UserError(f"{flag}={text}: expected {EXAMPLES}.")
    units = {match["unit"].upper() for match in found}
    if len(units) > 1:
        raise UserError(f"{flag}={text}: one unit of money for both, not {' and '.join(sorted(units))}.")
    each = {m["side"]: float(m["amount"]) / (float(m["size"] or 1) * SIZES[m["times"].lower()]) for m in found}
    return Price(units.pop(), each.get("input", each.get(None)), each.get("output", each.get(None)))
