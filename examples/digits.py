"""Handwritten digits and a vision transformer, beside the nearest training image.

pip install "minitransformer[images]"
python examples/digits.py            # a few minutes on two cores
python examples/digits.py --smoke    # seconds: a few steps on digits that the package draws, without the extra
"""

from __future__ import annotations

import argparse

import numpy as np

import minitransformer as mt

SHADES = " .:-=+*#%@"


class Shifted:
    """Images of `data` moved by up to a pixel: nine times as many to learn from."""

    def __init__(self, data: mt.data.ArrayDataset) -> None:
        self.data, self.source = data, {"shifted": data.source}

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        batch = self.data.batch(seed, step, batch_size)
        corners = np.random.default_rng([seed, step]).integers(3, size=(batch_size, 2))
        framed = np.pad(batch["pixels"], ((0, 0), (0, 0), (1, 1), (1, 1)))  # (B, 1, 10, 10)
        moved = [image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(framed, corners, strict=True)]
        return {**batch, "pixels": np.stack(moved)}


def nearest(train: mt.data.ArrayDataset, pixels: np.ndarray) -> np.ndarray:
    """For each image, the label of the training image at the least distance."""
    a, b = pixels.reshape(len(pixels), -1), train.arrays["pixels"].reshape(len(train), -1)
    distances = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)  # (images, training images)
    return train.arrays["labels"][distances.argmin(1)]


def shown(images: np.ndarray) -> str:
    """Images (N, 8, 8) beside each other in characters, two for a pixel."""
    shades = (images * (len(SHADES) - 1)).round().astype(int)
    return "\n".join("   ".join("".join(SHADES[p] * 2 for p in image[row]) for image in shades) for row in range(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps on drawn digits, which need no package")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train, held_out = (
        mt.data.digits() if not options.smoke else (mt.data.drawn_digits(500), mt.data.drawn_digits(50, 1))
    )

    mt.manual_seed(options.seed)
    model = mt.VisionTransformer(
        mt.VisionConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            dropout=0.1,
            num_labels=10,
        )
    )
    config = mt.TrainConfig(
        max_steps=20 if options.smoke else 3000,
        batch_size=64,
        learning_rate=2e-3,
        eval_interval=10 if options.smoke else 300,
        seed=options.seed,
    )
    mt.Trainer(model, config, Shifted(train), held_out).train()

    pixels, labels = held_out.arrays["pixels"], held_out.arrays["labels"]
    with mt.no_grad():
        predicted = model.eval()(pixels).logits.numpy().argmax(-1)
    print(f"{len(labels)} images that it was not trained on, {model.num_parameters():,} parameters")
    print(f"vision transformer      {mt.metrics.accuracy(predicted, labels):.1%} right")
    print(f"nearest training image  {mt.metrics.accuracy(nearest(train, pixels), labels):.1%} right")
    wrong = np.flatnonzero(predicted != labels)[:4]
    if wrong.size:
        print("\n" + shown(pixels[wrong, 0]))
        print("   ".join(f"{f'a {labels[i]}, taken for a {predicted[i]}':16}" for i in wrong))


if __name__ == "__main__":
    main()
