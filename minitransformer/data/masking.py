"""Masked language modelling: tokens hidden at random, to be found from those around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minitransformer.autograd import as_host
from minitransformer.checks import allocate, check_number, shown
from minitransformer.data.arrays import ArrayDataset
from minitransformer.data.batches import IGNORED, Batch, TokenDataset, step_generator, whole
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError

_STREAM = 1  # of random numbers: those of stream 0 draw the rows


class MaskedTokens:
    """The rows of `data` with tokens hidden as for BERT (Devlin et al. 2019), and `labels` that ask for them.

    Each token is chosen with `mlm_probability`. Of the chosen, 80 % become `mask_token_id`, 10 % a token drawn
    uniformly, 10 % stay as they are; their labels are the tokens, all others -100. `special_token_ids`, the mask
    token, and what an `attention_mask` says is padding are never chosen, and special tokens never drawn. `vocab_size`
    counts all ids.

    `data` is a `TokenDataset`, or an `ArrayDataset` of `input_ids` (N, T), of whose further arrays `attention_mask` and
    `token_type_ids` are kept. Raises `ConfigError`, `DTypeError`, `RangeError` or `ShapeError` for what makes no sense.
    """

    def __init__(
        self,
        data: TokenDataset | ArrayDataset,
        *,
        vocab_size: int,
        mask_token_id: int,
        special_token_ids: Sequence[int] = (),
        mlm_probability: float = 0.15,
    ) -> None:
        op = "MaskedTokens"
        if isinstance(data, ArrayDataset):
            self.block_size = _width(data)
        elif isinstance(data, TokenDataset):
            self.block_size = data.block_size
        else:
            raise DTypeError(op, f"data is {shown(data)}, expected a TokenDataset or ArrayDataset", "Make one first")
        self.mask_token_id = whole(op, "mask_token_id", mask_token_id, 0)
        special = as_host(op, special_token_ids)
        if special.size and special.dtype.kind not in "iu":
            raise DTypeError(op, f"special_token_ids have dtype {special.dtype}, expected integers", "Pass their ids")
        size = whole(op, "vocab_size", vocab_size, 1)
        # Python's integers, since neither int64 nor uint64 holds all that may be given.
        all_special = [*special.ravel().tolist(), self.mask_token_id]
        for token in all_special:
            if not 0 <= token < size:
                problem = f"a special token is {token}, expected ids from 0 to {size - 1}"
                raise RangeError(op, problem, "Count all of them in vocab_size")
        self.special = np.array(all_special)
        ids = allocate(op, "the ids", (size,), np.int64, lambda: np.arange(size))
        self.ordinary = np.setdiff1d(ids, self.special)
        if not self.ordinary.size:
            raise ConfigError(op, f"all {size} ids are special tokens", "Raise vocab_size, which counts all ids")
        self.probability = check_number(op, "mlm_probability", mlm_probability, below=1)
        self.data = data
        self.tokenizer = getattr(data, "tokenizer", None)
        self.source = {
            "data": data.source,
            "vocab_size": size,
            "mask_token_id": self.mask_token_id,
            "special_token_ids": self.special[:-1].tolist(),
            "mlm_probability": self.probability,
        }

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The batch of `data`, masked: a pure function of its arguments."""
        return self._masked(self.data.batch(seed, step, batch_size), step_generator(seed, step, _STREAM))

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """The batches of `data` in order, for evaluation: each row masked in the same way every time."""
        random = step_generator(0, 0, _STREAM)  # read on from row to row, so that batch_size changes nothing
        for batch in self.data.sequential(batch_size):
            yield self._masked(batch, random)

    def _masked(self, batch: Batch, random: np.random.Generator) -> Batch:
        ids = batch["input_ids"].astype(np.int64)
        p = self.probability
        chance, choice = np.moveaxis(random.random((*ids.shape, 2)), -1, 0)  # (B, T) each
        can = ~np.isin(ids, self.special)
        if "attention_mask" in batch:
            can &= batch["attention_mask"] == 1
        chosen = can & (chance < p)
        hidden = chosen & (chance < 0.8 * p)
        changed = chosen & ~hidden & (chance < 0.9 * p)
        drawn = self.ordinary[(choice * self.ordinary.size).astype(np.int64)]
        made = {"input_ids": np.where(hidden, self.mask_token_id, np.where(changed, drawn, ids))}
        made |= {name: batch[name] for name in ("attention_mask", "token_type_ids") if name in batch}
        return {**made, "labels": np.where(chosen, ids, IGNORED)}


def _width(data: ArrayDataset) -> int:
    """T of the rows of tokens (N, T) in `data`."""
    ids = data.arrays.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu":
        found = "none" if ids is None else f"{ids.dtype} of shape {ids.shape}"
        problem = f"the input_ids of the data are {found}, expected integers (rows, length)"
        raise ShapeError("MaskedTokens", problem, "Pass ArrayDataset(input_ids=rows)")
    return int(ids.shape[1])
