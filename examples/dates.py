"""Teach a Transformer to write dates as 2014-04-05, from eight ways in which people write them.

python examples/dates.py            # about three minutes on two cores
python examples/dates.py --smoke    # seconds, to see that it runs
"""

import argparse
from datetime import date, timedelta

import numpy as np

import minitransformer as mt

FORMATS = ["%d %B %Y", "%B %d, %Y", "%d %b %Y", "%b %d %y", "%d.%m.%Y", "%m/%d/%y", "%A, %d %B %Y", "%Y %b %d"]
LETTERS = " ,./-0123456789abcdefghijklmnopqrstuvwxyz"
PAD, END = 0, 1
LONGEST, ANSWER = 28, 11  # "wednesday, 30 september 2026", "2026-09-30" and the end
DAYS = [date(1970, 1, 1) + timedelta(n) for n in range(36525)]  # a century: %y is never ambiguous
ORDER = np.random.default_rng(0).permutation(len(DAYS))
HELD_OUT, TRAINED = ORDER[:1000], ORDER[1000:]


def encode(texts: list[str], length: int) -> np.ndarray:
    ids = np.full((len(texts), length), PAD)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) + 1] = [*(LETTERS.index(c) + 2 for c in text), END][:length]
    return ids


def decode(ids: np.ndarray) -> str:
    letters = ids[: np.flatnonzero(np.append(ids, END) == END)[0]]
    return "".join(LETTERS[i - 2] if i > END else "?" for i in letters)


class Dates:
    """Days in a random one of the formats, with the same day as ISO 8601 has it."""

    def __init__(self, days: np.ndarray) -> None:
        self.days = [DAYS[n] for n in days]
        self.source = {"dates": len(days)}

    def of(self, days: list[date], formats: list[str]) -> dict[str, np.ndarray]:
        written = [day.strftime(form).lower() for day, form in zip(days, formats, strict=True)]
        return {
            "input_ids": encode(written, LONGEST + 1),
            "labels": encode([day.isoformat() for day in days], ANSWER),
        }

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([seed, step])
        days = [self.days[i] for i in random.integers(len(self.days), size=batch_size)]
        return self.of(days, [FORMATS[i] for i in random.integers(len(FORMATS), size=batch_size)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a small model")
    smoke = parser.parse_args().smoke

    mt.manual_seed(0)
    width = 32 if smoke else 128
    model = mt.Transformer(len(LETTERS) + 2, width, 4, 4 * width, LONGEST + 1, ANSWER, 0.0)
    config = mt.TrainConfig(
        max_steps=20 if smoke else 1500,
        batch_size=64,
        learning_rate=2e-3,
        schedule="noam",
        warmup_steps=10 if smoke else 200,
        weight_decay=0.0,
    )
    mt.Trainer(model, config, Dates(TRAINED)).train()

    tested = HELD_OUT[: 20 if smoke else 1000]
    data = Dates(tested)
    batch = data.of(data.days, [FORMATS[i % len(FORMATS)] for i in range(len(tested))])
    for name, options in (("greedy", {}), ("4 beams", {"num_beams": 4})):
        answers = model.generate(batch["input_ids"], max_new_tokens=ANSWER - 1, eos_token_id=END, **options)[:, 1:]
        right = [decode(answer) == day.isoformat() for answer, day in zip(answers, data.days, strict=True)]
        print(f"{name}: {np.mean(right):.1%} of {len(right)} held-out dates exactly right")
    for ids, answer in list(zip(batch["input_ids"], answers, strict=True))[:8]:
        print(f"  {decode(ids):>28}  ->  {decode(answer)}")


if __name__ == "__main__":
    main()
