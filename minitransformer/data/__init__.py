"""From text and images to batches: tokenizers, corpora, digits, windows of tokens, rows of arrays."""

from minitransformer.data.arrays import ArrayDataset
from minitransformer.data.batches import TokenDataset, prepare
from minitransformer.data.corpora import Corpus, corpus
from minitransformer.data.images import digits, drawn_digits
from minitransformer.data.masking import MaskedTokens
from minitransformer.data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer

__all__ = [
    "ArrayDataset",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "MaskedTokens",
    "TokenDataset",
    "corpus",
    "digits",
    "drawn_digits",
    "load_tokenizer",
    "prepare",
]
