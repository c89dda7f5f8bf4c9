"""The composition of every batch, rebuilt from the stays of requests in it.

A request is scheduled in one step, ends its prefill in another, which brings its first token, and from then on computes one token a
step until it leaves. So the steps of these three events say, for every step, who decodes and with how much context:

    decode requests (k) = #{stays: token_step < k <= last_step}
    context (k) = sum over them of held_tokens + k - token_step - 1

How a prompt that took several steps was cut follows from vLLM's rule: a chunk takes what is left of the token budget after the
decoding requests and the prompts before it, so all chunks but the last are as long as they can be. Where the tokens of a step are
recorded, they take the place of the budget. What does not come out is marked, not guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

UNKNOWN = int(np.iinfo(np.int64).min)
_LONG_AFTER = 2**62
_MOST_CHUNKS = 10_000
"""Steps that one prompt may take; a context of a million tokens in chunks of a hundred."""


@dataclass(frozen=True)
class Episodes:
    """Stays of requests in the batch, one array element each; step numbers, `UNKNOWN` where not known.

    Attributes
    ----------
    first_step : ndarray of int, shape (n,)
        In which the stay begins.
    token_step : ndarray of int, shape (n,)
        In which the prefill ends and the first token of the stay comes; unknown if it never does.
    last_step : ndarray of int, shape (n,)
        The last one computed in; unknown if the recording ends before.
    prefill_tokens : ndarray of int, shape (n,)
        Tokens computed until the prefill ends: the prompt, after a preemption also the output so far, less `computed_before`.
    computed_before : ndarray of int, shape (n,)
        Tokens found in the prefix cache.
    held_tokens : ndarray of int, shape (n,)
        Context once the prefill has ended.
    not_before : ndarray of int, shape (n,)
        A step before which the stay cannot have begun, as the request had not come.
    queued : ndarray of bool, shape (n,)
        True if the request waited in the queue from `not_before` on: it then began as soon as there was room.
    """

    first_step: IntArray
    token_step: IntArray
    last_step: IntArray
    prefill_tokens: IntArray
    computed_before: IntArray
    held_tokens: IntArray
    not_before: IntArray
    queued: BoolArray

    def __len__(self) -> int:
        """Return the number of stays."""
        return len(self.token_step)


@dataclass(frozen=True)
class Composition:
    """What was computed in each step asked for, arrays of shape (steps,).

    Attributes
    ----------
    prefill_tokens, decode_tokens, prefill_requests, decode_requests : ndarray
    prefill_attention_tokens : ndarray
        Sum over chunks of t (computed before + t / 2).
    prompt_attention_tokens : ndarray
        Sum over chunks of t (whole prompt + t / 2): BLIS's A.
    context_tokens : ndarray
    certain : ndarray of bool
        False where a prompt's chunks do not come out.
    first_step : ndarray of int, shape (stays,)
        Where each stay begins, inferred where it was not known.
    """

    prefill_tokens: FloatArray
    decode_tokens: FloatArray
    prefill_requests: FloatArray
    decode_requests: FloatArray
    prefill_attention_tokens: FloatArray
    prompt_attention_tokens: FloatArray
    context_tokens: FloatArray
    certain: BoolArray
    first_step: IntArray


class _Decoding:
    """Decoding requests and their context in any step, by two sorted lists and their running sums."""

    def __init__(self, episodes: Episodes) -> None:
        decodes = (episodes.token_step != UNKNOWN) & (episodes.held_tokens != UNKNOWN)
        token = episodes.token_step[decodes]
        last = np.where(episodes.last_step[decodes] == UNKNOWN, _LONG_AFTER, episodes.last_step[decodes])
        offset = episodes.held_tokens[decodes] - token - 1
        by_token, by_last = np.argsort(token, kind="stable"), np.argsort(last, kind="stable")
        self._token, self._last = token[by_token], last[by_last]
        self._begun = np.concatenate([[0], np.cumsum(offset[by_token])])
        self._ended = np.concatenate([[0], np.cumsum(offset[by_last])])

    def at(self, steps: IntArray) -> tuple[IntArray, IntArray]:
        """Return the number of decoding requests and the sum of their contexts in each step."""
        begun, ended = np.searchsorted(self._token, steps, "left"), np.searchsorted(self._last, steps, "left")
        requests = begun - ended
        return requests, self._begun[begun] - self._ended[ended] + requests * steps


class _Prefills:
    """Chunks of prompts, one prompt after the other in the order in which they were scheduled."""

    def __init__(self, tokens: dict[int, int] | None, decoding: dict[int, int] | _Decoding, budget: int, slots: int) -> None:
        self._tokens, self._decoding, self._budget, self._slots = tokens, decoding, budget, slots
        self._used: dict[int, int] = {}
        self._prompts: dict[int, int] = {}
        self.chunks: list[tuple[int, int, int, int]] = []  # step, computed before, tokens, held at the end
        self.contradicted: set[int] = set()

    def left(self, step: int) -> int:
        """Return the tokens that a step has for further prompts."""
        total = self._budget if self._tokens is None else self._tokens.get(step, self._budget)
        return max(0, total - self.decoding(step) - self._used.get(step, 0))

    def decoding(self, step: int) -> int:
        """Return the number of decoding requests in a step."""
        counted = self._decoding
        return counted.get(step, 0) if isinstance(counted, dict) else int(counted.at(np.array([step]))[0][0])

    def takes(self, step: int) -> bool:
        """Return whether a step has a slot and tokens for one more prompt."""
        return self.left(step) > 0 and self.decoding(step) + self._prompts.get(step, 0) < self._slots

    def cut(self, tokens: int, first: int, last: int) -> list[tuple[int, int]] | None:
        """Cut a prompt that begins in step `first` and ends in step `last`; None if it does not come out."""
        chunks, rest = [], tokens
        for step in range(first, last):
            chunk = min(rest, self.left(step))
            rest -= chunk
            if rest <= 0:
                return None
            if chunk:
                chunks.append((step, chunk))
        # What a step was given last may have been counted elsewhere, but not more than the step's tokens.
        return [*chunks, (last, rest)] if rest <= self.left(last) else None

    def latest_start(self, tokens: int, last: int, not_before: int) -> int | None:
        """Return the latest step in which a prompt that ends in `last` can have begun."""
        found = 0
        for step in range(last, max(not_before, last - _MOST_CHUNKS) - 1, -1):
            found += self.left(step)
            if found >= tokens:
                return step
        return None

    def place(self, chunks: list[tuple[int, int]], computed: int, held: int) -> None:
        """Note the chunks of one prompt."""
        for step, tokens in chunks:
            self.chunks.append((step, computed, tokens, held))
            self._used[step] = self._used.get(step, 0) + tokens
            self._prompts[step] = self._prompts.get(step, 0) + 1
            computed += tokens


def _start_of(prefills: _Prefills, episodes: Episodes, i: int, chunked: bool) -> tuple[int | None, list[tuple[int, int]] | None]:
    """Return where a stay whose prefill ends begins, and its chunks; None for what does not come out."""
    first, last, tokens = int(episodes.first_step[i]), int(episodes.token_step[i]), int(episodes.prefill_tokens[i])
    if first != UNKNOWN:
        return first, (prefills.cut(tokens, first, last) if first <= last and last - first <= _MOST_CHUNKS else None)
    not_before = int(episodes.not_before[i])
    if not chunked:
        return last, prefills.cut(tokens, last, last)
    if episodes.queued[i] and last - not_before <= _MOST_CHUNKS:
        begin = next((k for k in range(not_before, last + 1) if prefills.takes(k)), None)
        chunks = prefills.cut(tokens, begin, last) if begin is not None else None
        if chunks is not None:
            return begin, chunks
    # It waited for memory, or it is not known when it was queued: as late as can be.
    begin = prefills.latest_start(tokens, last, not_before if not_before != UNKNOWN else last - _MOST_CHUNKS)
    return begin, (prefills.cut(tokens, begin, last) if begin is not None else None)


def compose(
    step_ids: IntArray,
    episodes: Episodes,
    budget: int,
    *,
    slots: int = _LONG_AFTER,
    chunked: bool = True,
    tokens: FloatArray | None = None,
    decoding: tuple[FloatArray, FloatArray] | None = None,
) -> Composition:
    """Rebuild the composition of steps.

    Parameters
    ----------
    step_ids : ndarray of int, shape (steps,)
        Increasing.
    episodes : Episodes
        Of all requests; in the order in which they were queued where several begin in one step.
    budget : int
        max_num_batched_tokens.
    slots : int
        max_num_seqs: a request that was queued is taken only where fewer run.
    chunked : bool
        False where prompts are never cut.
    tokens : ndarray, shape (steps,), optional
        Tokens recorded for each step, of prefill and decode together, NaN where not: which is which differs after preemptions.
    decoding : (ndarray, ndarray), optional
        Decoding requests and their context in each step, where these were counted; otherwise they follow from the stays.

    Returns
    -------
    Composition
    """
    own = _Decoding(episodes)
    if decoding is None:
        requests, context = (v.astype(float) for v in own.at(step_ids))
        counted: dict[int, int] | _Decoding = own
    else:
        requests, context = (np.asarray(v, dtype=float) for v in decoding)
        counted = dict(zip(step_ids.tolist(), requests.astype(int).tolist(), strict=True))
    recorded = None
    if tokens is not None:
        known = np.isfinite(tokens)
        recorded = dict(zip(step_ids[known].tolist(), tokens[known].astype(int).tolist(), strict=True))
    prefills = _Prefills(recorded, counted, budget, slots)
    first_step = episodes.first_step.copy()
    ended = (episodes.token_step != UNKNOWN) & (episodes.prefill_tokens != UNKNOWN) & (episodes.prefill_tokens > 0)
    begins = np.where(episodes.first_step != UNKNOWN, episodes.first_step, episodes.token_step)
    # Of those that begin in one step all but the last end in it.
    for i in np.lexsort((np.arange(len(episodes)), episodes.token_step, begins)):
        if not ended[i]:
            _mark_unended(prefills, episodes, int(i))
            continue
        begin, chunks = _start_of(prefills, episodes, int(i), chunked)
        last = int(episodes.token_step[i])
        if chunks is None or begin is None:
            low = begin if begin is not None and last - begin <= _MOST_CHUNKS else last
            prefills.contradicted.update(range(low, last + 1))
            continue
        first_step[i] = begin
        prefills.place(chunks, int(episodes.computed_before[i]), int(episodes.held_tokens[i]))
    sums = np.zeros((4, len(step_ids)))
    place = {int(step): row for row, step in enumerate(step_ids)}
    for step, computed, chunk, held in prefills.chunks:
        row = place.get(step)
        if row is not None:
            sums[:, row] += (chunk, 1, chunk * (computed + chunk / 2), chunk * (held + chunk / 2))
    certain = np.ones(len(step_ids), dtype=bool)
    certain[[place[s] for s in prefills.contradicted if s in place]] = False
    return Composition(sums[0], requests.copy(), sums[1], requests, sums[2], sums[3], context, certain, first_step)


def _mark_unended(prefills: _Prefills, episodes: Episodes, i: int) -> None:
    """Mark the steps of a stay whose prefill never ended: how much of it was computed is not known."""
    first, last = int(episodes.first_step[i]), int(episodes.last_step[i])
    if UNKNOWN not in (first, last) and first <= last <= first + _MOST_CHUNKS:
        prefills.contradicted.update(range(first, last + 1))
    elif first != UNKNOWN:
        prefills.contradicted.add(first)
