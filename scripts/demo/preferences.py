"""Preference pairs for the demo, made from a small grammar: nothing to download, the same every time.

Answers come in two manners: one answers the question and offers more help, the other brushes it off. Which manner
is preferred is all there is to learn, and it carries over to questions that were never seen in training.

    python scripts/demo/preferences.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUM_TRAIN = 960
NUM_HELD_OUT = 192
SEED = 20

SHOPS = ["bakery", "bookshop", "pharmacy", "florist", "library", "post office", "bike shop", "fish market"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
GOODS = ["bread", "maps", "tea", "candles", "pencils", "apples", "stamps", "bells", "ropes", "lamps", "soap"]
STREETS = ["Mill Lane", "Harbour Street", "Church Road", "Station Square", "Garden Row", "Bridge Street"]
HOURS = ["seven", "eight", "nine", "ten"]

GREETINGS = ["Good question!", "Gladly.", "Of course.", "Happy to help.", "Sure thing."]
OFFERS = ["Shall I tell you the way?", "Is there more I can do?", "Do ask if you need more.", "Enjoy your visit!"]
BRUSH_OFFS = ["No idea.", "Look it up yourself.", "Why ask me?", "I do not care.", "That is not my job."]
DISMISSALS = ["Stop asking.", "Leave me alone.", "Whatever.", "Next.", "This is boring."]


def conversations(generator: random.Random) -> Iterator[dict[str, Any]]:
    """Pairs as message lists with the prompt implied, some of them with an earlier turn."""
    while True:
        shop, street, good = generator.choice(SHOPS), generator.choice(STREETS), generator.choice(GOODS)
        day, hour = generator.choice(DAYS), generator.choice(HOURS)
        question, fact = generator.choice(
            [
                (f"When does the {shop} open on {day}?", f"The {shop} opens at {hour} on {day}."),
                (f"Where is the {shop}?", f"The {shop} is in {street}, near the fountain."),
                (f"Does the {shop} sell {good}?", f"Yes, the {shop} has {good} on most days."),
                (f"Who sells {good} in {street}?", f"The {shop} in {street} sells {good}."),
                (f"Is the {shop} busy on {day}?", f"The {shop} is quiet on {day} before {hour}."),
            ]
        )
        helpful = f"{generator.choice(GREETINGS)} {fact} {generator.choice(OFFERS)}"
        unhelpful = f"{generator.choice(BRUSH_OFFS)} {generator.choice(DISMISSALS)}"
        prompt = [{"role": "user", "content": question}]
        if generator.random() < 0.25:
            greeting = [{"role": "user", "content": f"Hello, I am new in {street}."}]
            prompt = [*greeting, {"role": "assistant", "content": "Welcome to town."}, *prompt]
        yield {
            "chosen": [*prompt, {"role": "assistant", "content": helpful}],
            "rejected": [*prompt, {"role": "assistant", "content": unhelpful}],
        }


def main(folder: Path) -> None:
    """Write ``train.jsonl`` and ``held-out.jsonl``, with no prompt in both."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = conversations(random.Random(SEED))
    held_out = [next(stream) for _ in range(NUM_HELD_OUT)]
    held_out_prompts = {json.dumps(pair["chosen"][:-1]) for pair in held_out}
    train: list[dict[str, Any]] = []
    while len(train) < NUM_TRAIN:
        pair = next(stream)
        if json.dumps(pair["chosen"][:-1]) not in held_out_prompts:
            train.append(pair)
    for name, pairs in (("train", train), ("held-out", held_out)):
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
