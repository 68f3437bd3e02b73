"""From text to batches: tokenizers, corpora, windows and rows of tokens, masked tokens."""

from minitransformer.data.batches import TokenDataset, prepare
from minitransformer.data.corpora import Corpus, corpus
from minitransformer.data.masking import MaskedTokens
from minitransformer.data.rows import RowDataset
from minitransformer.data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "MaskedTokens",
    "RowDataset",
    "TokenDataset",
    "corpus",
    "load_tokenizer",
    "prepare",
]
