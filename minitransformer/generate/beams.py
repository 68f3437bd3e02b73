"""Beam search: the likeliest continuations, several at once (Sutskever et al. 2014)."""

from __future__ import annotations

import numpy as np


class Beams:
    """For each of `rows` prompts the N likeliest prefixes, and the best continuation that has ended.

    A step extends every live prefix by every token and keeps the N likeliest extensions, by their sum of
    log-probabilities. One that ends with `eos_token_id` leaves the beam and gives up its place. Continuations are
    compared by log p / n ** length_penalty, n the number of their tokens, the end included; of those of one score
    the first found stays. A row's search ends when no live prefix can get above the best.

    So one beam is greedy decoding, and where N is never less than the number of extensions the search is exhaustive.
    """

    def __init__(
        self, rows: int, num_beams: int, max_new_tokens: int, length_penalty: float, eos_token_id: int | None
    ) -> None:
        self.rows, self.N, self.most, self.eos = rows, num_beams, max_new_tokens, eos_token_id
        self.penalty = float(length_penalty)
        self.scores = np.full((rows, num_beams), -np.inf)  # log p of the live prefixes, likeliest first; -inf: none
        self.scores[:, :1] = 0
        self.best_scores = np.full(rows, -np.inf)
        self.best_ids: list[np.ndarray] = [np.zeros(0, np.int64)] * rows

    def step(self, logits: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Extend by one token: logits (rows N, V) after the new tokens `ids` (rows N, n) so far.

        Returns the row (rows N,) that each new prefix continues, its new token, and whether all is done with it.
        """
        rows, N, V = self.rows, self.N, logits.shape[1]
        n = ids.shape[1] + 1
        top = logits.max(axis=1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)
        with np.errstate(divide="ignore"):
            log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))  # (rows N, V)
        log_p[np.isnan(log_p)] = -np.inf  # where no token is possible
        totals = (self.scores[:, :, None] + log_p.reshape(rows, N, V)).reshape(rows, N * V)
        chosen = np.argsort(-totals, axis=1, kind="stable")[:, :N]  # ties by beam, then by token
        self.scores = np.take_along_axis(totals, chosen, axis=1)
        beam, token = np.divmod(chosen, V)  # (rows, N)
        came_from = beam + N * np.arange(rows)[:, None]
        if self.eos is not None:
            for row, place in zip(*np.nonzero((token == self.eos) & (self.scores > -np.inf)), strict=True):
                self._offer(row, self.scores[row, place], np.append(ids[came_from[row, place]], self.eos))
                self.scores[row, place] = -np.inf
        # log p only falls, and the divisor is largest, or smallest, at the longest possible.
        with np.errstate(invalid="ignore"):
            reachable = self.scores.max(axis=1) / max(float(self.most) ** self.penalty, float(n) ** self.penalty)
        over = (self.scores.max(axis=1) == -np.inf) | (reachable <= self.best_scores)
        return came_from.reshape(-1), token.reshape(-1), np.repeat(over, N)

    def best(self, ids: np.ndarray) -> np.ndarray:
        """The best continuation of each row (rows, n) among those that ended and the live `ids` (rows N, n).

        Shorter ones are filled with `eos_token_id`.
        """
        n = ids.shape[1]
        for row, place in zip(*np.nonzero(self.scores > -np.inf), strict=True):
            self._offer(row, self.scores[row, place], ids[row * self.N + place])
        longest = max(map(len, self.best_ids), default=0)
        out = np.zeros((self.rows, longest if n else 0), np.int64)
        for row, found in enumerate(self.best_ids):
            out[row, : len(found)] = found
            out[row, len(found) :] = 0 if self.eos is None else self.eos
        return out

    def _offer(self, row: int, log_p: float, ids: np.ndarray) -> None:
        score = log_p / float(max(len(ids), 1)) ** self.penalty
        if score > self.best_scores[row]:
            self.best_scores[row], self.best_ids[row] = score, ids.copy()
