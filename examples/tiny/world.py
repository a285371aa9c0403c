"""A small online shop: its goods, its customers, what they ask for and how they say it.

A `Request` is what a customer wants. `message` says it as customers do, with greetings, asides and slips of the
keyboard; `target` is the same request as strict JSON. The tuning task is to get from the first to the second.

Templates are plain text with `[this|that]` for a choice and `{slot}` for a value. Randomness comes from
`Random.random()` alone, the one method whose sequence Python promises to keep, so a seed gives the same bytes on
every version.
"""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")

INTENTS = ("order", "return", "delay", "cancel", "broken", "question")

# fmt: off
GOODS = (
    "alarm clock", "backpack", "bath towel", "blanket", "bookshelf", "candle", "curtain", "cushion", "cutting board",
    "desk lamp", "fountain pen", "frying pan", "garden chair", "hair dryer", "helmet", "kettle", "kite", "lantern",
    "laptop sleeve", "lunch box", "mug", "notebook", "phone case", "picture frame", "pillow", "puzzle", "raincoat",
    "rug", "scarf", "suitcase", "tablecloth", "teapot", "toothbrush", "toy train", "travel bag", "umbrella", "vase",
    "wall clock", "water bottle", "watering can",
)
CITIES = (
    "Bath", "Bristol", "Cardiff", "Cork", "Derby", "Dublin", "Exeter", "Galway", "Leeds", "Oxford", "Perth", "York",
)
FIRST_NAMES = (
    "Ada", "Amir", "Ben", "Clara", "Dan", "Elif", "Emma", "Finn", "Grace", "Hana", "Ivan", "Jonas", "Kofi", "Lena",
    "Lucy", "Maria", "Mei", "Nora", "Omar", "Paul", "Rosa", "Sam", "Tom", "Zoe",
)
LAST_NAMES = (
    "Bell", "Brook", "Cole", "Dale", "Field", "Ford", "Hill", "Khan", "Lane", "Marsh", "Moss", "North", "Okoro",
    "Reed", "Shaw", "Stone", "West", "Wood",
)
# fmt: on
IRREGULAR_PLURALS = {
    "bookshelf": "bookshelves",
    "lunch box": "lunch boxes",
    "scarf": "scarves",
    "toothbrush": "toothbrushes",
}
PRODUCTS = {name: IRREGULAR_PLURALS.get(name, f"{name}s") for name in GOODS}  # in the singular and in the plural
COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "red", "white", "yellow")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Every way a message says a number. The test of consistency reads this table too.
NUMBER_WORDS = {
    1: ("one", "1", "a", "an", "a single"),
    2: ("two", "2", "a pair of", "a couple of"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
    6: ("six", "6", "half a dozen"),
    7: ("seven", "7"),
    8: ("eight", "8"),
    9: ("nine", "9"),
}
ORDER_LETTERS = "ABCDEFGHKM"


@dataclass(frozen=True)
class Request:
    """What a message asks for; None where the message does not say. The field order is that of the JSON."""

    intent: str
    product: str | None = None
    colour: str | None = None
    quantity: int | None = None
    order: str | None = None


def target(request: Request) -> str:
    """Return the request as one line of strict JSON with fixed key order."""
    return json.dumps(asdict(request))


def prompt(text: str) -> str:
    """Return the frame around a message; the completion follows it directly."""
    return f"Message: {text}\nJSON:\n"


# --- randomness and templates ---------------------------------------------------------------------------------------


def pick(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def chance(rng: Random, probability: float) -> bool:
    return rng.random() < probability


def fill(rng: Random, template: str, **slots: object) -> str:
    """Take one way through every `[this|that]` of the template, then fill in the slots."""
    chosen = re.sub(r"\[([^]]*)\]", lambda match: pick(rng, match[1].split("|")), template)
    return chosen.format(**slots)


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# --- drawing requests -----------------------------------------------------------------------------------------------


def draw_order_number(rng: Random) -> str:
    """A letter and four digits, none of them twice."""
    digits = list("0123456789")
    return pick(rng, ORDER_LETTERS) + "".join(digits.pop(int(rng.random() * len(digits))) for _ in range(4))


def draw_name(rng: Random) -> str:
    return f"{pick(rng, FIRST_NAMES)} {pick(rng, LAST_NAMES)}"


def is_held_out(request: Request) -> bool:
    """Whether the request belongs to evaluation only: one (intent, product, colour) in twelve.

    Neither the pretraining text nor the tuning rows ever ask for such a combination. Requests without a product are
    divided by their order number.
    """
    key = f"{request.intent}|{request.product}|{request.colour if request.product else request.order}"
    return zlib.crc32(key.encode()) % 12 == 0


def draw_request(rng: Random, held_out: bool = False) -> Request:
    """Draw a request from one side of the division that `is_held_out` makes."""
    while True:
        request = _draw_any_request(rng)
        if is_held_out(request) == held_out:
            return request


def _draw_any_request(rng: Random) -> Request:
    intent = pick(rng, INTENTS)
    about_past_order = intent not in ("order", "question")
    order = draw_order_number(rng) if about_past_order and chance(rng, 0.85) else None
    if order and chance(rng, 0.12):
        return Request(intent, order=order)
    counted = intent == "order" or (about_past_order and chance(rng, 0.5))
    return Request(
        intent,
        product=pick(rng, tuple(PRODUCTS)),
        colour=pick(rng, COLOURS) if chance(rng, 0.65) else None,
        quantity=pick(rng, (1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9)) if counted else None,
        order=order,
    )


# --- messages -------------------------------------------------------------------------------------------------------

# {item} is "two blue desk lamps", "my kettle" or, in a question, "blue desk lamps"; {ref} is " from order A4821" or "".
CORES = {
    "order": (
        "[I want|I would like|I'd like|I wish] to [order|buy|get] {item}[| please].",
        "[Can|Could|May] I [order|buy|get|have] {item}[| please]?",
        "Please [send me|put me down for|add to my basket|sell me] {item}.",
        "[I am|I'm] [looking to buy|going to need|ready to order] {item}.",
        "[I'll take|I will take|I need|We need] {item}[ for my flat| for our office| for a friend|].",
        "[New order|An order], please: {item}.",
    ),
    "return": (
        "[I want|I would like|I'd like|I need|I have] to [return|send back|give back] {item}{ref}.",
        "[Can|Could|May] I [return|send back|bring back] {item}{ref}?",
        "How do I [return|send back] {item}{ref}?",
        "Please [take back|refund] {item}{ref}.",
        "[I want|I'd like] [my money back|a refund] for {item}{ref}.",
        "{item}{ref} {does} not suit me and I want to [return|send back] {it}.",
    ),
    "delay": (
        "Where {is} {item}{ref}?",
        "{item}{ref} {has} not [arrived|come|turned up] [yet|so far].",
        "I am still waiting for {item}{ref}.",
        "[Any news about|What happened to|Can you track] {item}{ref}?",
        "When will {item}{ref} [arrive|be here|get here]?",
        "{item}{ref} {is} [late|overdue|still on the way].",
    ),
    "cancel": (
        "[Please|Can you|Could you] [cancel|stop] {item}{ref}.",
        "[I want|I would like|I'd like|I need] to cancel {item}{ref}.",
        "[I do not|I don't|We no longer] [need|want] {item}{ref}, [please cancel|cancel] {it}.",
        "Please do not [send|ship] {item}{ref}.",
        "Is it too late to cancel {item}{ref}?",
        "[Stop|Cancel] {item}{ref} before [shipping|packing|the parcel leaves].",
    ),
    "broken": (
        "{item}{ref} [arrived|came] [broken|damaged|cracked|scratched|in pieces].",
        "{item}{ref} [stopped working|fell apart|broke] [after one day|at once|on the first day].",
        "{item}{ref} {is} [broken|faulty|damaged|torn].",
        "I [opened the box|got my parcel] and {item}{ref} {was} [broken|cracked|bent|smashed].",
        "There is [a crack|a hole|a big dent|a fault] in {item}{ref}.",
        "You sent me {item}{ref} and {they} {was} [broken|damaged|cracked].",
    ),
    "question": (
        "Do you [sell|have|stock] {item}?",
        "[How much|What] do {item} cost?",
        "Are {item} [in stock|easy to clean|made here|on sale]?",
        "[When|How soon] will you have {item} [again|back in stock]?",
        "[Can you tell me|I wonder|I'd like to know] [how heavy|how big|how strong] {item} are.",
        "Are your {item} [safe for children|waterproof|good for a gift]?",
    ),
}

# The same for requests that name an order and no product.
ORDER_CORES = {
    "return": (
        "[I want|I'd like|I need] to [return|send back] [everything in|all of|the whole] order {order}.",
        "How do I [return|send back] order {order}?",
        "Please [take back|refund] order {order}.",
    ),
    "delay": (
        "[Where is|What happened to|Any news about] [my order|my parcel|order] {order}?",
        "Order {order} [has not arrived|is late|is overdue|did not turn up].",
        "I am still waiting for [my order|order|parcel] {order}.",
    ),
    "cancel": (
        "Please [cancel|stop|do not ship] [my order|order] {order}.",
        "[I want|I would like|I need] to cancel [my order|order] {order}.",
        "Is it too late to cancel order {order}?",
    ),
    "broken": (
        "[Everything in|All of] order {order} [arrived|came] [broken|damaged|in pieces].",
        "Order {order} [arrived|came] [broken|damaged|smashed].",
        "My parcel {order} was [crushed|smashed|torn open] and all of it is broken.",
    ),
}

ORDER_REFS = (" from order {order}", " (order {order})", " in order {order}", " from my order {order}")
ORDER_SENTENCES = (
    "[My|The] order number is {order}.",
    "[It is|This is about|I am writing about] order {order}.",
    "Order[| number|:] {order}.",
    "Reference {order}.",
)

DETAILS = {
    "order": (
        "[Send it|Please ship] to {city}.",
        "[It is|They are] for my {relative}.",
        "I need this by {day}.",
        "I will pay by card.",
        "We move house in {days} days.",
    ),
    "return": (
        "[It is not|That is not] what I expected.",
        "[I changed my mind|My {relative} has one already|I found it cheaper elsewhere].",
        "The [size|shape|feel] is wrong.",
        "I paid {price} pounds.",
        "I bought it {days} days ago.",
    ),
    "delay": (
        "[It was|This was] due {days} days ago.",
        "You [said|promised] {day}.",
        "I paid {days} weeks ago.",
        "It should come to {city}.",
        "My {relative} is waiting too.",
    ),
    "cancel": (
        "[I changed my mind|I ordered by mistake|My {relative} bought the same].",
        "I only ordered {days} hours ago.",
        "I move to {city} on {day}.",
        "You can keep the gift card.",
        "I hope this is in time.",
    ),
    "broken": (
        "What can you do about it?",
        "Please send a new one.",
        "My {relative} is very sad.",
        "The box looked fine.",
        "It came on {day}.",
        "I paid {price} pounds for this!",
    ),
    "question": (
        "I would pick [it|them] up in {city}.",
        "[It would be|They would be] a gift for my {relative}.",
        "I can spend {price} pounds.",
        "I have looked for {days} weeks.",
        "I could not find it on your page.",
    ),
}
ASIDES = (
    "I [live|work] in {city}.",
    "I have been a customer for {days} years.",
    "[Sorry|I am sorry] to bother you.",
    "This is my first message.",
    "I wrote to you on {day} [already|too].",
    "You can call me after {hour}.",
)
RELATIVES = ("mother", "father", "sister", "brother", "son", "daughter", "aunt", "uncle", "neighbour", "teacher")
GREETINGS = (
    "Hi,",
    "Hi!",
    "Hello,",
    "Hello there,",
    "Good morning,",
    "Good evening.",
    "Dear shop,",
    "Hey,",
    "Dear all,",
)
CLOSINGS = (
    "Thanks!",
    "Thank you.",
    "Many thanks, {name}",
    "Best, {name}",
    "Kind regards, {name}",
    "{name}",
    "Please let me know.",
    "Have a nice day.",
)


SINGULAR = {"is": "is", "has": "has", "was": "was", "does": "does", "it": "it", "they": "it"}
PLURAL = {"is": "are", "has": "have", "was": "were", "does": "do", "it": "them", "they": "they"}


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def _noun(rng: Random, request: Request, many: bool) -> str:
    """The product with its colour before or after it."""
    noun = PRODUCTS[request.product] if many else request.product
    if request.colour is None:
        return noun
    return f"{noun} in {request.colour}" if chance(rng, 0.2) else f"{request.colour} {noun}"


def item_phrase(rng: Random, request: Request) -> str:
    """Name what the request is about: "the blue kettle" without a quantity, else "two kettles in blue"."""
    many = request.quantity is not None and request.quantity > 1
    noun = _noun(rng, request, many)
    if request.quantity is None:
        return f"{pick(rng, ('the', 'my', 'this'))} {noun}"
    if request.quantity == 1:
        return f"{pick(rng, (_article(noun), _article(noun), 'one', '1', 'a single'))} {noun}"
    return f"{pick(rng, NUMBER_WORDS[request.quantity])} {noun}"


def small_talk(rng: Random) -> dict[str, object]:
    """Values that messages and stories mention and no request is about."""
    days = 2 + int(rng.random() * 8)
    return {
        "city": pick(rng, CITIES),
        "day": pick(rng, WEEKDAYS),
        "days": pick(rng, NUMBER_WORDS[days][:2]),
        "hour": 2 + int(rng.random() * 8),
        "name": pick(rng, FIRST_NAMES) if chance(rng, 0.6) else draw_name(rng),
        "price": 5 + int(rng.random() * 90),
        "relative": pick(rng, RELATIVES),
    }


def clean_message(rng: Random, request: Request) -> str:
    """Say the request in one to five sentences, without slips."""
    slots = small_talk(rng)
    agreement = PLURAL if request.quantity is not None and request.quantity > 1 else SINGULAR
    parts = []
    if request.product is None:
        parts.append(fill(rng, pick(rng, ORDER_CORES[request.intent]), order=request.order))
    else:
        inline = request.order is not None and chance(rng, 0.6)
        ref = fill(rng, pick(rng, ORDER_REFS), order=request.order) if inline else ""
        item = _noun(rng, request, many=True) if request.intent == "question" else item_phrase(rng, request)
        parts.append(sentence(fill(rng, pick(rng, CORES[request.intent]), item=item, ref=ref, **agreement)))
        if request.order is not None and not inline:
            stated = fill(rng, pick(rng, ORDER_SENTENCES), order=request.order)
            parts.insert(int(rng.random() * 2), stated)
    if chance(rng, 0.5):
        parts.append(fill(rng, pick(rng, DETAILS[request.intent]), **slots))
    if chance(rng, 0.15):
        parts.insert(int(rng.random() * (len(parts) + 1)), fill(rng, pick(rng, ASIDES), **slots))
    if chance(rng, 0.5):
        parts.insert(0, pick(rng, GREETINGS))
    if chance(rng, 0.4):
        parts.append(fill(rng, pick(rng, CLOSINGS), **slots))
    return " ".join(parts)


def message(rng: Random, request: Request) -> str:
    """Say the request as a customer types it: now and then in lower case, with a slip, or without the last stop."""
    text = clean_message(rng, request)
    if chance(rng, 0.12):
        text = slip(rng, text)
    if chance(rng, 0.15):
        text = text.lower()
    return text.rstrip(".!") if chance(rng, 0.15) else text


SLOT_WORDS = frozenset(
    word
    for phrase in (*PRODUCTS, *PRODUCTS.values(), *COLOURS, *sum(NUMBER_WORDS.values(), ()))
    for word in phrase.split()
)


def slip(rng: Random, text: str) -> str:
    """Swap two letters, or lose one, inside a word that no field is read from."""
    words = [m for m in re.finditer(r"[A-Za-z]{4,}", text) if m[0].lower() not in SLOT_WORDS]
    if not words:
        return text
    start, end = pick(rng, words).span()
    at = start + 1 + int(rng.random() * (end - start - 2))
    wrong = text[at + 1] + text[at] if chance(rng, 0.5) else text[at + 1]
    return text[:at] + wrong + text[at + 2 :]


def rows(rng: Random, count: int, held_out: bool = False, taken: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Return `count` rows `{"prompt", "completion"}` with messages all different from each other and from `taken`."""
    found: dict[str, str] = {}
    while len(found) < count:
        request = draw_request(rng, held_out)
        text = prompt(message(rng, request))
        if text not in taken:
            found.setdefault(text, target(request))
    return [{"prompt": text, "completion": completion} for text, completion in found.items()]
