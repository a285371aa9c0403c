"""What the base model reads: messages with the notes an agent took, dialogues, stories, and the shop's own records.

The notes say in plain language what a message asks for, so the base learns to read messages and to copy out of them.
It never sees a message followed by JSON: that is left to tuning. Braces and quotes it knows from other records.
"""

import json
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import accumulate, cycle
from random import Random

from world import (
    CITIES,
    COLOURS,
    INTENTS,
    LAST_NAMES,
    NUMBER_WORDS,
    PRODUCTS,
    WEEKDAYS,
    Request,
    chance,
    draw_name,
    draw_order_number,
    draw_request,
    fill,
    message,
    pick,
    sentence,
    small_talk,
)

NOTES = {
    "order": (
        "The customer [wants to buy|orders|would like to have] {item}.",
        "A new order for {item}.",
        "Sell {item}.",
    ),
    "return": (
        "The customer wants to [return|send back] {item}{ref}.",
        "A return of {item}{ref}.",
        "Take back {item}{ref}.",
    ),
    "delay": (
        "The customer is [waiting for|missing] {item}{ref}.",
        "A delay of {item}{ref}.",
        "Find out where {item}{ref} can be.",
    ),
    "cancel": (
        "The customer wants to cancel {item}{ref}.",
        "A cancel request for {item}{ref}.",
        "Stop {item}{ref} from being sent.",
    ),
    "broken": (
        "The customer [got|received] {item}{ref} broken.",
        "A broken delivery: {item}{ref}.",
        "Replace {item}{ref}, broken on arrival.",
    ),
    "question": (
        "The customer [asks|has a question] about {item}.",
        "A question about {item}.",
        "Tell the customer more about {item}.",
    ),
}

# The agent's reading of the message, put back to the customer, and the end of the talk.
CONFIRMATIONS = {
    "order": "So you [want|would like] to buy {item}?",
    "return": "So you [want|would like] to return {item}{ref}?",
    "delay": "So you are still waiting for {item}{ref}?",
    "cancel": "So you want me to cancel {item}{ref}?",
    "broken": "So you got {item}{ref} broken?",
    "question": "So you want to know more about {item}?",
}
OUTCOMES = {
    "order": ("I have put {item} in your basket.", "{item} will leave on {day}."),
    "return": ("Please send {item} back by {day}.", "You will have your money for {item} on {day}."),
    "delay": ("I see {item} in {city} and it should arrive on {day}.", "I will look for {item} today."),
    "cancel": ("Done, we will not send {item}.", "I have stopped {item}."),
    "broken": (
        "I am sorry. You will get new goods in place of {item}.",
        "I am sorry. Keep {item}, we send more on {day}.",
    ),
    "question": (
        "I will ask our buyer about {item} and write to you on {day}.",
        "You can see {item} in our shop in {city}.",
    ),
}

QUESTIONS = {
    "intent": ("What [kind of message|sort of request] is it?", "What is the topic?"),
    "product": ("Which product is it about?", "What is the item?"),
    "colour": ("Which colour is it?", "What colour does the customer name?"),
    "quantity": ("How many are there?", "What is the quantity?"),
    "order": ("Which order is it?", "What is the order number?"),
}
LABELS = {
    "intent": ("Topic", "Kind"),
    "product": ("Item", "Product"),
    "colour": ("Colour",),
    "quantity": ("Count", "Quantity"),
    "order": ("Order", "Reference"),
}


def plain_item(rng: Random, request: Request) -> str:
    """Restate the goods with the quantity, where one is known, always as "2" or "two"."""
    if request.product is None:
        return "the whole order"
    many = request.quantity != 1 and (request.quantity is not None or request.intent == "question")
    noun = PRODUCTS[request.product] if many else request.product
    count = NUMBER_WORDS[request.quantity][int(rng.random() * 2)] if request.quantity else None
    if count is None and request.intent != "question":
        count = "the"
    return " ".join(word for word in (count, request.colour, noun) if word)


def plain_reference(rng: Random, request: Request) -> str:
    return pick(rng, (f" from order {request.order}", f", order {request.order}")) if request.order else ""


def _restate(rng: Random, template: str, request: Request) -> str:
    slots = small_talk(rng) | {"item": plain_item(rng, request), "ref": plain_reference(rng, request)}
    return sentence(fill(rng, template, **slots))


def _values(rng: Random, request: Request) -> dict[str, str]:
    """The fields as an agent writes them: "none" where the message does not say, words now and then in quotes."""
    quote = '"' if chance(rng, 0.5) else ""
    words = {name: f"{quote}{value}{quote}" for name, value in vars(request).items() if isinstance(value, str)}
    return {name: words.get(name, "none" if value is None else str(value)) for name, value in vars(request).items()}


# --- documents: each takes the generator and returns one text -------------------------------------------------------


def noted_message(rng: Random) -> str:
    request = draw_request(rng)
    return f"Message: {message(rng, request)}\nNote: {_restate(rng, pick(rng, NOTES[request.intent]), request)}"


def message_with_form(rng: Random) -> str:
    """A message and a form of labelled lines, in any order, some left out."""
    request = draw_request(rng)
    fields = [field for field in _values(rng, request).items() if chance(rng, 0.8)]
    start = int(rng.random() * (len(fields) or 1))
    lines = [f"{pick(rng, LABELS[name])}: {value}" for name, value in fields[start:] + fields[:start]]
    return "\n".join([f"Message: {message(rng, request)}", *lines])


def message_with_questions(rng: Random) -> str:
    request = draw_request(rng)
    values = _values(rng, request)
    text = f"Message: {message(rng, request)}"
    for _ in range(2 + int(rng.random() * 3)):
        name = pick(rng, tuple(values))
        text += f"\nQuestion: {fill(rng, pick(rng, QUESTIONS[name]))}\nAnswer: {values[name]}"
    return text


def dialogue(rng: Random) -> str:
    request = draw_request(rng)
    lines = [
        f"Customer: {message(rng, request)}",
        f"Agent: {_restate(rng, CONFIRMATIONS[request.intent], request)}",
        f"Customer: {fill(rng, '[Yes, please|That is right|Yes, exactly|Right|Yes]')}.",
        f"Agent: {_restate(rng, pick(rng, OUTCOMES[request.intent]), request)}",
    ]
    return "\n".join(lines)


def read_back(rng: Random) -> str:
    """One to four things said twice, most of them order numbers: the shortest way to learn to copy."""

    def thing() -> str:
        if chance(rng, 0.7):
            return draw_order_number(rng)
        return plain_item(rng, draw_request(rng)) if chance(rng, 0.5) else draw_name(rng)

    things = ", ".join(thing() for _ in range(1 + int(rng.random() * 4)))
    return fill(rng, "[List|Customer|Shelf]: {things}\n[Again|Agent|Read back]: {things}", things=things)


STORY_STARTS = (
    "On {day}, {name} [went to|walked to|drove to] the shop in {city}.",
    "{name} lives in {city} and [needs|was looking for|dreams of] a new {product}.",
    "It was a [cold|warm|rainy|quiet] {day} in {city}. {name} [opened the shop early|was alone in the shop].",
    "{name} [had|found] an old {product} at home, and it was [broken|worn out|too small].",
)
STORY_MIDDLES = (
    "The {product} on the shelf was {colour}, and {name} liked {colour} best.",
    '"Do you have this {product} in {colour}?" asked {name}. "We have {count} of them," said {helper}.',
    "{helper} showed {name} {count} {plural}, and the {colour} one was the nicest.",
    "There were {count} {plural} left, all of them {colour}.",
    "{name} counted the {plural} again: there were {count}, no more and no less.",
    "The {colour} {product} cost {price} pounds. {name} thought about it for {days} minutes.",
    "{helper} wrote down the order number, {order}, and gave the note to {name}.",
    'A parcel with the number {order} stood by the door. "Is {order} mine?" asked {name}. "Yes, {order} is yours."',
)
STORY_ENDS = (
    "In the end {name} took the {colour} {product} home to {city}.",
    "{name} paid {price} pounds and left the shop [happy|in a hurry|with a smile].",
    "Order {order} left the shop on {day}, and {name} was [glad|content|very pleased].",
    "{name} gave the {product} to a [friend|cousin|child], who [loved it|put it in the garden|laughed].",
)


def story(rng: Random) -> str:
    """A visit to the shop in three to five sentences."""
    product = pick(rng, tuple(PRODUCTS))
    slots = small_talk(rng) | {
        "product": product,
        "plural": PRODUCTS[product],
        "colour": pick(rng, COLOURS),
        "count": pick(rng, NUMBER_WORDS[2 + int(rng.random() * 8)][:2]),
        "order": draw_order_number(rng),
        "helper": f"{pick(rng, ('Mr', 'Mrs', 'Ms'))} {pick(rng, LAST_NAMES)}",
    }
    middles = [pick(rng, STORY_MIDDLES) for _ in range(1 + int(rng.random() * 3))]
    return fill(rng, " ".join([pick(rng, STORY_STARTS), *dict.fromkeys(middles), pick(rng, STORY_ENDS)]), **slots)


def _several(rng: Random, options: tuple[str, ...], count: int) -> list[str]:
    """Up to `count` different options, in the order of drawing."""
    return list(dict.fromkeys(pick(rng, options) for _ in range(count)))


def _record(rng: Random, title: str, text: str, record: dict[str, object]) -> str:
    """The text, the record, or both."""
    parts = [part for part in (text, json.dumps(record)) if chance(rng, 0.75)] or [text]
    return "\n".join([title, *parts])


def catalogue_entry(rng: Random) -> str:
    product = pick(rng, tuple(PRODUCTS))
    colours = _several(rng, COLOURS, 3)
    price, stock = 5 + int(rng.random() * 90), int(rng.random() * 30)
    known = " and ".join(colours)
    text = f"The {product} comes in {known}. It costs {price} pounds and we have {stock} in stock."
    return _record(
        rng, "Catalogue", text, {"name": product, "colours": colours, "price": price, "stock": stock or None}
    )


def parcel_entry(rng: Random) -> str:
    order, city, day = draw_order_number(rng), pick(rng, CITIES), pick(rng, WEEKDAYS)
    weight = 1 + int(rng.random() * 9)
    text = f"Parcel {order} goes to {city} on {day} and weighs {weight} kilos."
    return _record(rng, "Parcels", text, {"parcel": order, "city": city, "day": day, "kilos": weight})


def stock_entry(rng: Random) -> str:
    product, colour = pick(rng, tuple(PRODUCTS)), pick(rng, COLOURS)
    quantity, shelf = 2 + int(rng.random() * 8), 1 + int(rng.random() * 40)
    text = f"There are {quantity} {colour} {PRODUCTS[product]} on shelf {shelf}."
    return _record(rng, "Stock", text, {"shelf": shelf, "quantity": quantity, "colour": colour, "product": product})


def tally_entry(rng: Random) -> str:
    intent, day, number = pick(rng, INTENTS), pick(rng, WEEKDAYS), 2 + int(rng.random() * 30)
    text = f"{day} brought {number} messages with the intent {intent}."
    return _record(rng, "Tally", text, {"day": day, "intent": intent, "messages": number})


def customer_entry(rng: Random) -> str:
    name, city, orders = draw_name(rng), pick(rng, CITIES), [draw_order_number(rng) for _ in range(2)]
    text = f"{name} lives in {city} and placed the orders {' and '.join(orders)}."
    return _record(rng, "Customers", text, {"customer": name, "city": city, "orders": orders, "note": None})


# --- what the base can do besides, to see what tuning costs it: prompts and what it read after such ------------------


def _parted(text: str, at: str) -> tuple[str, str]:
    """The text in two, before the last `at` that it holds and behind it; the prompt keeps `at` but for its space."""
    prompt, _, completion = text.rpartition(at)
    return prompt + at.rstrip(" "), " " + completion


def _halves(text: str) -> tuple[str, str]:
    """The text in two after half of its words."""
    words = text.split(" ")
    half = len(words) // 2
    return " ".join(words[:half]), " " + " ".join(words[half:])


DOMAINS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "notes": lambda rng: _parted(noted_message(rng), "\nNote: "),
    "questions": lambda rng: _parted(message_with_questions(rng), "\nAnswer: "),
    "copying": lambda rng: _parted(read_back(rng), ": "),
    "stories": lambda rng: _halves(story(rng)),
}


def general(rng: Random, count: int) -> Iterator[dict[str, str]]:
    """Yield `count` rows of other things than the tuning's task, of each domain in turn."""
    for _, (domain, draw) in zip(range(count), cycle(DOMAINS.items())):
        prompt, completion = draw(rng)
        yield {"domain": domain, "prompt": prompt, "completion": completion}


def orders(rng: Random, count: int) -> Iterator[dict[str, str]]:
    """Yield `count` messages that name an order, and that order: what the base can be asked for in its own words."""
    found = 0
    while found < count:
        request = draw_request(rng)
        text = message(rng, request)
        if request.order is not None and request.order in text:
            yield {"prompt": text, "completion": request.order}
            found += 1


# Shares of documents, which add up to 1.
MIXTURE: tuple[tuple[float, Callable[[Random], str]], ...] = (
    (0.25, noted_message),
    (0.14, message_with_form),
    (0.12, message_with_questions),
    (0.10, dialogue),
    (0.15, read_back),
    (0.10, story),
    (0.04, catalogue_entry),
    (0.03, parcel_entry),
    (0.03, stock_entry),
    (0.02, tally_entry),
    (0.02, customer_entry),
)


def documents(rng: Random, count: int) -> Iterator[str]:
    """Yield `count` documents in the shares of `MIXTURE`."""
    bounds = list(accumulate(share for share, _ in MIXTURE[:-1]))
    for _ in range(count):
        yield MIXTURE[bisect(bounds, rng.random())][1](rng)
