"""Wrong models: positions, labels and tied weights of a GPT."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer.models import GPT
from minitransformer.nn import KVCache
from minitransformer.testing.bugs.bug import bug

_CACHED = "tests/models/test_generate.py::test_cached_logits_are_the_uncached_ones_however_the_tokens_are_fed"


@bug(
    GPT,
    "forward",
    story="The data are shifted by the loader and shifted again by the model: it learns to predict the token after the "
    "next. Two conventions, `labels` of Hugging Face and `targets` of nanoGPT, meet.",
    exercise="The loss falls, to a higher value. How does one see the shift in a single call?",
    solution="By the gradient: the loss must depend on the logits of the last position, and here it does not. Or by "
    "the number: the mean of -log p[target], computed by hand.",
    caught_by=["tests/models/test_gpt.py::test_labels_are_targets_shifted_inside"],
)
def targets_shifted_again(
    right: Any,
    self: Any,
    input_ids: Any,
    attention_mask: Any = None,
    labels: Any = None,
    targets: Any = None,
    cache: Any = None,
    **options: Any,
) -> Any:
    if labels is None:
        labels, targets = targets, None
    return right(self, input_ids, attention_mask, labels, targets, cache, **options)


@bug(
    KVCache,
    "advance",
    story="The cache moves on, the position does not: every new token stands at position 0. Text that differs with a "
    "cache is met everywhere (x-transformers#219; torchtune#959; huggingface/transformers#36536, #25420).",
    exercise="Keys, values and masks are right, and greedy text starts well. Which law fails, and for which "
    "`positions` does it not?",
    solution="L2, cached = uncached, in float64 to 1e-12. With positions=None, or ALiBi, which counts keys, it holds.",
    caught_by=[_CACHED],
)
def position_without_cache_offset(right: Any, self: Any, T: int) -> None:
    before = self.length
    right(self, T)
    self.length = before


@bug(
    GPT,
    "_logits",
    story="Prompts of unequal length are padded on the left, and positions are counted from the padding on, not from "
    "the first real token (huggingface/transformers#25420, #34232; unslothai/unsloth#3803).",
    exercise="The mask hides all padding, and yet it is seen. By what? And why not with rotary positions?",
    solution="By the positions: L4, left padding = no padding, fails for learned ones. Rotary scores depend on "
    "distance only (L17), so that a shift of a whole row is invisible.",
    caught_by=["tests/models/test_generate.py::test_padding_on_the_left_changes_no_token"],
)
def positions_count_padding(right: Any, self: Any, ids: Any, real: Any, cache: Any) -> Any:
    if real is None or self.config.positions != "learned":
        return right(self, ids, real, cache)
    past = 0 if cache is None else cache.length
    twin = copy.copy(self)
    twin.wpe = lambda positions: self.wpe(np.broadcast_to(np.arange(past, past + ids.shape[1]), ids.shape))
    return right(twin, ids, real, cache)


@bug(
    GPT,
    "_logits",
    story="The output matrix is the token embedding, but as a copy: its half of the gradient is lost.",
    exercise="The forward is right to the last bit, and the model trains. What must be compared?",
    solution="The gradient of the tied weight with differences of the loss: it is the sum of what comes through the "
    "embedding and through the output. Checks of single ops and layers see nothing.",
    caught_by=["tests/models/test_gpt.py::test_combined_options_have_the_gradient_of_differences"],
)
def tied_weight_counted_once(right: Any, self: Any, ids: Any, real: Any, cache: Any) -> Any:
    if not self.config.tie_weights:
        return right(self, ids, real, cache)
    twin = copy.copy(self)
    twin.config = replace(self.config, tie_weights=False)
    twin.head = partial(F.linear, weight=self.wte.weight.detach())
    return right(twin, ids, real, cache)
