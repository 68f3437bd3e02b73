"""From text to batches: tokenizers, corpora, and windows of tokens."""

from minitransformer.data.batches import TokenDataset, prepare
from minitransformer.data.corpora import Corpus, corpus
from minitransformer.data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "TokenDataset",
    "corpus",
    "load_tokenizer",
    "prepare",
]
