"""Wrong training: accumulation, clipping, decay, bias correction, and what a resumed run forgets."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from minitransformer.kernels import serve
from minitransformer.optim import Adam, FlatParameters, Optimizer
from minitransformer.testing.bugs.bug import bug
from minitransformer.training.step import TrainStep

_ACCUMULATION = "tests/training/test_step.py::test_accumulated_batches_are_one_batch_divided_by_all_targets_once"
_RESUME = "tests/training/test_resume.py::test_stopped_and_resumed_equals_uninterrupted_byte_for_byte"


@bug(
    TrainStep,
    "_shards",
    story="The loss of each accumulated batch is its own mean, and the means are averaged: a token of a short batch "
    "counts more (huggingface/transformers#34191, #35438; nanochat#59).",
    exercise="With batches of equal numbers of targets nobody notices. State the law.",
    solution="Accumulated batches are one large batch: same loss, same gradient, for any number of targets in each.",
    caught_by=[_ACCUMULATION],
)
def accumulation_averages_means(right: Any, self: Any, batches: Any) -> Any:
    shards, first = [], 0
    for batch in batches:
        for shard in right(self, [batch]):  # whose weights are shares of this batch's targets
            shards.append(shard._replace(first_row=first + shard.first_row, weight=shard.weight / len(batches)))
        first += len(next(iter(batch.values())))
    return shards


@bug(
    TrainStep,
    "_accumulate",
    story="The clipping stands inside the loop over accumulated batches, before all of the gradient is there.",
    exercise="While no gradient is longer than `grad_clip`, nothing is wrong. Which test clips and accumulates?",
    solution="One that compares with the whole gradient, clipped once: a sum of clipped parts has another direction.",
    caught_by=["tests/training/test_step.py::test_the_whole_gradient_is_clipped_by_its_norm"],
)
def clipped_before_accumulation_ends(right: Any, self: Any, batches: Any, step: int) -> float:
    kernel = serve("optimizer", self.gradient)
    loss, total = 0.0, np.zeros_like(self.gradient)
    for share, gradients in self.workers.run(partial(self._run, shard, step) for shard in self._shards(batches)):
        loss += share
        gradient = np.concatenate([g.reshape(-1) for g in gradients])
        kernel.clip_(gradient, self.config.grad_clip or np.inf)
        total += gradient
    self.gradient[:] = total
    return loss


@bug(
    FlatParameters,
    "__init__",
    story="Weight decay pulls on all parameters, the biases and the weights of norms included, which it draws to 0 "
    "where 1 is their neutral value.",
    exercise="With zero gradients, which parameters may an AdamW step change?",
    solution="Those with two dimensions or more, and no others.",
    caught_by=["tests/test_optim.py::test_only_parameters_with_two_dimensions_decay"],
)
def weight_decay_on_norms(right: Any, self: Any, params: Any) -> None:
    right(self, params)
    self.num_decayed = self.data.size


@bug(
    Adam,
    "_update",
    story="Steps are counted from 0, where the bias correction divides by 0; a max(step, 1) makes the error go away, "
    "and the first two steps share one correction.",
    exercise="After some thousand steps hardly a difference is left. What is the first step of Adam, for any gradient?",
    solution="lr in every element, with the sign of the gradient (eps aside). The second one is where this goes wrong: "
    "compare a few steps with the formula, or with PyTorch.",
    caught_by=["tests/test_optim.py::test_adam_is_its_formula"],
)
def adam_counts_from_zero(right: Any, self: Any, data: Any, gradient: Any) -> None:
    steps = self.steps
    self.steps = max(steps - 1, 1)
    right(self, data, gradient)
    self.steps = steps


@bug(
    TrainStep,
    "__init__",
    story="A resumed run makes its schedule anew and counts from 0: the warm-up comes twice, the decay too late. "
    "That a resume is none is an old complaint (huggingface/transformers#33336, #17032).",
    exercise="Weights and moments are restored to the bit. What shows the mistake without looking at the rate?",
    solution="The law of resuming: stopped and resumed equals uninterrupted, byte for byte, log included.",
    caught_by=[_RESUME],
)
def schedule_restarts_on_resume(right: Any, self: Any, *args: Any) -> None:
    right(self, *args)
    schedule, first = self.schedule, []

    def restarted(step: int) -> float:
        first.append(step)
        return schedule(step - first[0])

    self.schedule = restarted


@bug(
    Optimizer,
    "load_state",
    story="A checkpoint that holds the weights alone, so that Adam starts with moments of 0: the other way to a resume "
    "that is none (nanoGPT#467, #358).",
    exercise="The loss jumps after each resume and recovers in some hundred steps. Which test needs only two steps?",
    solution="The law of resuming, stopped after the first: stopped and resumed equals uninterrupted.",
    caught_by=[_RESUME, "tests/test_optim.py::test_a_resumed_run_has_the_same_bits"],
)
def moments_lost_on_resume(right: Any, self: Any, arrays: Any, numbers: Any) -> None:
    right(self, arrays, numbers)
    for array in self._state.values():
        array[...] = 0
