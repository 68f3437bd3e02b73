"""Teach a captioner to say which handwritten digits are where in an image, and in which order to read them.

pip install "minitransformer[images]"   # the digits are in scikit-learn's package
python examples/captions.py             # about two minutes on two cores
python examples/captions.py --smoke     # seconds, to see that it runs, with digits drawn in a font
"""

import argparse

import numpy as np

import minitransformer as mt

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["<pad>", "<end>", "top", "bottom", "left", "right", *DIGITS]
CELLS = ["top left", "top right", "bottom left", "bottom right"]
LENGTH = 3 * len(CELLS) + 1  # three words a cell, and the end


class Scenes:
    """Images of 2 x 2 cells, each empty or with one of the digits (N, 1, 8, 8), and what they show."""

    def __init__(self, digits: mt.data.ArrayDataset) -> None:
        self.pixels, self.labels = digits.arrays["pixels"], digits.arrays["labels"]
        self.source = {"digits": len(self.labels)}

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([seed, step])
        images = np.zeros((batch_size, 1, 16, 16), np.float32)
        captions = np.zeros((batch_size, LENGTH), np.int64)
        for image, caption in zip(images, captions, strict=True):
            words = []
            cells = np.flatnonzero(random.random(4) < 0.6) if random.random() < 0.95 else []
            for cell in cells:
                n = random.integers(len(self.labels))
                y, x = 8 * (cell // 2), 8 * (cell % 2)
                image[0, y : y + 8, x : x + 8] = self.pixels[n, 0]
                words += [*CELLS[cell].split(), DIGITS[self.labels[n]]]
            caption[: len(words) + 1] = [*map(WORDS.index, words), WORDS.index("<end>")]
        return {"pixels": images, "labels": captions}


def text(ids: np.ndarray) -> str:
    end = np.flatnonzero(np.append(ids, 1) == 1)[0]
    words = [WORDS[i] for i in ids[:end]]
    return ", ".join(" ".join(words[i : i + 3]) for i in range(0, len(words), 3)) or "nothing"


def picture(image: np.ndarray) -> str:
    return "\n".join("  " + "".join(" .:+#@"[int(5 * value)] * 2 for value in line) for line in image[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a small model")
    smoke = parser.parse_args().smoke
    train, held_out = (mt.data.drawn_digits(50, seed) for seed in (0, 1)) if smoke else mt.data.digits()

    mt.manual_seed(0)
    width = 32 if smoke else 64
    shape = {"image_size": 16, "patch_size": 4, "d_model": width, "dff": 4 * width, "num_heads": 4}
    model = mt.ImageCaptioner(mt.CaptionerConfig(len(WORDS), LENGTH, dropout_rate=0.1, **shape))
    config = mt.TrainConfig(
        max_steps=20 if smoke else 3000,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=10 if smoke else 200,
        eval_interval=10**9,
    )
    mt.Trainer(model, config, Scenes(train)).train()

    batch = Scenes(held_out).batch(1, 0, 20 if smoke else 1000)
    captions = model.generate(batch["pixels"], max_new_tokens=LENGTH - 1, eos_token_id=1)[:, 1:]
    right = [text(found) == text(label) for found, label in zip(captions, batch["labels"], strict=True)]
    print(f"{np.mean(right):.1%} of {len(right)} captions of digits it has not seen are exactly right")
    for image, found, label in list(zip(batch["pixels"], captions, batch["labels"], strict=True))[:3]:
        print(picture(image))
        print(f"  it says: {text(found)}\n  there is: {text(label)}")


if __name__ == "__main__":
    main()
