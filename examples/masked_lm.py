"""BERT learns Python's documentation by filling gaps, then to tell from which topic a passage is.

    python examples/masked_lm.py            # a few minutes on two cores
    python examples/masked_lm.py --smoke    # seconds: does it run?

The held-out accuracy stands beside that of a BERT trained without the gaps, and of naive Bayes on bags of words.
"""

import argparse
import re
from collections import Counter
from pydoc_data.topics import topics

import numpy as np

import minitransformer as mt
from minitransformer.data import ArrayDataset, MaskedTokens

SPECIAL = ["[PAD]", "[CLS]", "[MASK]", "[UNK]"]
PAD, CLS, MASK, UNK = range(len(SPECIAL))
WORDS, TOPICS, LENGTH = 2500, 12, 32


def passages() -> tuple[list[str], np.ndarray, np.ndarray]:
    """The vocabulary, rows [CLS] and LENGTH words, and the number of each row's topic: -100 but for the longest."""
    texts = [re.findall(r"[a-z_]+|\d+|[^\w\s]", text.lower()) for text in topics.values()]
    common = Counter(word for text in texts for word in text).most_common(WORDS)
    vocabulary = [*SPECIAL, *(word for word, _ in common)]
    number = {word: i for i, word in enumerate(vocabulary)}
    longest = sorted(range(len(texts)), key=lambda i: -len(texts[i]))[:TOPICS]
    rows, labels = [], []
    for i, text in enumerate(texts):
        for first in range(0, len(text) - LENGTH + 1, LENGTH):
            rows.append([CLS, *(number.get(word, UNK) for word in text[first : first + LENGTH])])
            labels.append(longest.index(i) if i in longest else -100)
    return vocabulary, np.array(rows), np.array(labels)


def train(model, data, held_out, steps: int, rate: float) -> None:
    settings = {"schedule": "linear", "eval_interval": max(steps // 4, 1)}
    config = mt.TrainConfig(max_steps=steps, batch_size=32, learning_rate=rate, **settings)
    mt.Trainer(model, config, data, held_out).train()
    model.eval()


def fill_gaps(model, vocabulary: list[str], rows: np.ndarray) -> None:
    """Hide a word in the middle of each row, and print what the model would put there."""
    gap = LENGTH // 2
    hidden = rows.copy()
    hidden[:, gap] = MASK
    with mt.no_grad():
        chances = mt.functional.softmax(model(hidden).logits[:, gap]).numpy()
    for row, chance in zip(rows, chances, strict=True):
        words = [vocabulary[i] for i in row]
        guesses = ", ".join(f"{vocabulary[i]} {chance[i]:.2f}" for i in np.argsort(-chance)[:3])
        print("  ", *words[gap - 6 : gap], f"[{words[gap]}]", *words[gap + 1 : gap + 7], " <- ", guesses)


def naive_bayes(rows: np.ndarray, labels: np.ndarray, questions: np.ndarray, words: int) -> np.ndarray:
    """The topic that makes a bag of words likeliest, every word of every topic counted once more than it occurs."""
    counts = np.ones((TOPICS, words))
    np.add.at(counts, (labels[:, None], rows), 1)
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))  # (topics, words)
    return (log_p[:, questions].sum(axis=2).T + np.log(np.bincount(labels))).argmax(axis=1)


def main(smoke: bool) -> None:
    vocabulary, rows, labels = passages()
    last = np.arange(len(rows)) % 5 == 4  # every fifth passage is held out, from the gaps too
    known, asked = ~last & (labels >= 0), last & (labels >= 0)
    mt.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = mt.BERTConfig(len(vocabulary), **shape, max_position_embeddings=LENGTH + 1, num_labels=TOPICS)
    special = {"vocab_size": len(vocabulary), "mask_token_id": MASK, "special_token_ids": [PAD, CLS, UNK]}
    gaps, held_out_gaps = (MaskedTokens(ArrayDataset(input_ids=rows[which]), **special) for which in (~last, last))
    pretrained = mt.BERTForMaskedLM(config)
    train(pretrained, gaps, held_out_gaps, steps=3 if smoke else 2000, rate=1e-3)
    print("Words of held-out passages, and what the model would put in their place:")
    fill_gaps(pretrained, vocabulary, rows[asked][::60][:8])

    topic = [ArrayDataset(input_ids=rows[which], labels=labels[which]) for which in (known, asked)]
    right = {"naive Bayes": naive_bayes(rows[known], labels[known], rows[asked], len(vocabulary))}
    fresh, tuned = mt.BERTForSequenceClassification(config), mt.BERTForSequenceClassification.from_encoder(pretrained)
    for name, model in (("BERT from the start", fresh), ("BERT, pretrained", tuned)):
        train(model, *topic, steps=3 if smoke else 400, rate=5e-4)
        with mt.no_grad():
            right[name] = model(rows[asked]).logits.numpy().argmax(axis=1)
    print(f"From which of {TOPICS} topics are {asked.sum()} held-out passages of {LENGTH} words? Right:")
    for name, answers in right.items():
        print(f"  {name:20} {np.mean(answers == labels[asked]):.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="three steps each")
    main(parser.parse_args().smoke)
