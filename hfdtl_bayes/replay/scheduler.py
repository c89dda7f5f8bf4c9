"""vLLM's continuous batching, step by step.

Each step takes running requests first, one token for each that decodes and the next chunk of a prompt that is under way, then
waiting ones in the order of their arrival while slots (max_num_seqs), tokens (max_num_batched_tokens) and blocks of the KV cache
last. A prompt that does not fit in the rest of the budget is cut, or waits where chunked prefill is off; nothing behind it passes it.
When a decoding request needs a block and there is none, the request that came last is preempted: it gives all its blocks back and
waits, in front of the others, to compute its prompt and its output so far anew; no waiting request is taken in such a step. What is
computed anew counts as prefill here; vLLM 0.32 reports it as generated tokens.

The cost of a step does not depend on the size of its batch. Since every decoding request gains one token in every step, it is known
when it joins in which step it ends (`_ending`) and in which steps it needs a block (every `block_tokens` steps, `_needing`), and
the sum of contexts grows by the number of decoding requests. At most one prompt is under way, the last of the running requests:
it has taken the rest of a budget, so nothing was taken after it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay.batch import Batch, StepTime, TimedStepTime
from hfdtl_bayes.replay.cache import BlockCache
from hfdtl_bayes.replay.requests import Requests
from hfdtl_bayes.replay.settings import ReplaySettings

_NEVER = float("nan")
_MICRO = 1_000_000
_ROUNDING_US = 1e-6
"""Step times come in seconds; the microsecond that 7e-3 s times 1e6 falls short of by rounding is not to be lost by truncation."""


@dataclass
class _Journey:
    """What is recorded of one request, times in ticks of the clock."""

    arrival: float
    queued: float = _NEVER
    scheduled: float = _NEVER
    first_token: float = _NEVER
    finished: float = _NEVER
    cached: int = 0
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    preemptions: int = 0


class Scheduler:
    """One run of an engine over requests; `run` it once.

    Parameters
    ----------
    requests : Requests
    configuration : ServingConfiguration
    step_time : callable
    settings : ReplaySettings
    send_until_s : float
        No request is sent at or after this time.
    """

    def __init__(
        self,
        requests: Requests,
        configuration: ServingConfiguration,
        step_time: StepTime,
        settings: ReplaySettings,
        send_until_s: float = float("inf"),
    ) -> None:
        engine = configuration.engine
        self.requests, self.step_time, self.settings = requests, step_time, settings
        self._timed = step_time if isinstance(step_time, TimedStepTime) else None
        self._seqs, self._budget, self._chunked = engine.max_num_seqs, engine.max_num_batched_tokens, engine.chunked_prefill
        self._prompt = [int(v) for v in requests.prompt_tokens]
        self._output = [int(v) for v in requests.output_tokens]
        blocks = int(engine.kv_capacity_tokens // settings.block_tokens) - settings.reserved_blocks
        self._group, prefixes = self._prefix_groups(engine.prefix_caching)
        self._given = [int(v) if engine.prefix_caching else 0 for v in requests.cached_tokens]
        self._check(configuration, blocks)
        self._cache = BlockCache(blocks, settings.block_tokens, prefixes)
        # Time: seconds, or whole microseconds.
        self._ticks = _MICRO if settings.whole_microseconds else 1
        self._until = send_until_s * self._ticks
        self._set_overheads()
        # Sending.
        self._journeys: dict[int, _Journey] = {}
        self._next = 0
        self._coming: list[tuple[float, int]] = []
        # The engine.
        self._now: float = 0
        self._step = 0
        self._waiting: deque[int] = deque()
        self._running: dict[int, None] = {}  # in the order of admission
        self._partial = -1
        self._computed = [0] * len(requests)
        self._produced = [0] * len(requests)
        self._shared_blocks = [0] * len(requests)
        self._joined = [-1] * len(requests)  # the first step in which a request decodes; -1 while it does not
        self._decoding = 0
        self._context = 0
        self._ending: dict[int, list[int]] = {}
        self._ends = [-1] * len(requests)
        self._needing = [0] * settings.block_tokens
        self._rows: list[tuple[float, ...]] = []
        self._times: list[float] = []
        self._regimes: list[str] = []
        self._regime = ""

    # What is fixed before the first step.

    def _prefix_groups(self, caching: bool) -> tuple[list[int], list[int]]:
        """Return the group of each request, -1 for none, and the prefix length of each group."""
        requests = self.requests
        shares = (requests.shared_prefix_tokens > 0) & (requests.cached_tokens < 0) & caching
        _, first, index = np.unique(requests.prefix_group[shares], return_index=True, return_inverse=True)
        groups = np.full(len(requests), -1)
        groups[shares] = index
        lengths = requests.shared_prefix_tokens[shares][first]
        return [int(g) for g in groups], [int(t) for t in lengths]

    def _check(self, configuration: ServingConfiguration, blocks: int) -> None:
        name, engine = configuration.config_id, configuration.engine
        if self._budget < self._seqs:
            raise InputError(
                f"{name}: max_num_batched_tokens ({self._budget}) is less than max_num_seqs ({self._seqs}), which vLLM refuses: "
                "every running request needs a token per step"
            )
        if blocks < 1:
            raise InputError(
                f"{name}: kv_capacity_tokens ({engine.kv_capacity_tokens:g}) holds no block of {self.settings.block_tokens} tokens "
                f"beside {self.settings.reserved_blocks} reserved"
            )
        most = self.requests.prompt_tokens + self.requests.output_tokens - 1
        room = blocks * self.settings.block_tokens
        limits = [(room, f"the KV cache holds {room}")]
        if not self._chunked:
            limits.append((self._budget, f"without chunked prefill max_num_batched_tokens ({self._budget}) must hold it whole"))
        for limit, why in limits:
            large = np.flatnonzero(most > limit)
            if len(large):
                i = int(large[0])
                raise InputError(
                    f"{name}: {len(large)} request(s) can never be served; request {self.requests.request_id[i]!r} comes to "
                    f"{most[i]} tokens (prompt {self._prompt[i]}, output {self._output[i]}) and {why}. Leave them out, or change the "
                    "configuration"
                )

    def _set_overheads(self) -> None:
        o, ticks = self.settings.overheads, self._ticks
        prompt = self.requests.prompt_tokens
        before = (o.before_queue_s + o.before_queue_s_per_prompt_token * prompt) * ticks
        per_token, after = o.per_output_token_s * ticks, o.after_finish_s * ticks
        arrival = self.requests.arrival_s * ticks
        if self.settings.whole_microseconds:
            arrival = np.rint(arrival).astype(np.int64)
            before = np.floor(before + _ROUNDING_US).astype(np.int64)
            per_token, after = int(per_token + _ROUNDING_US), int(after + _ROUNDING_US)
        self._arrival, self._before = arrival.tolist(), before.tolist()
        self._per_token, self._after = per_token, after

    # Requests on their way.

    def _send(self, not_before: float) -> None:
        """Send the next request, at its own time or when a place among those in flight is free."""
        i = self._next
        if i >= len(self._arrival):
            return
        sent = max(self._arrival[i], not_before)
        if sent >= self._until:
            self._next = len(self._arrival)
            return
        self._next += 1
        self._journeys[i] = _Journey(sent)
        heapq.heappush(self._coming, (sent + self._before[i], i))

    def _poll(self) -> None:
        """Take in what has come by now."""
        coming, waiting = self._coming, self._waiting
        while coming and coming[0][0] <= self._now:
            _, i = heapq.heappop(coming)
            journey = self._journeys[i]
            journey.queued = self._now
            journey.waiting, journey.running, journey.kv_usage = len(waiting), len(self._running), self._cache.usage
            waiting.append(i)
            self._regime = self.requests.regime[i]

    # One step.

    def run(self) -> None:
        """Serve all requests."""
        for _ in range(min(self.requests.concurrency or len(self.requests), len(self.requests))):
            self._send(0)
        while True:
            self._poll()
            if not self._running and not self._waiting:
                if not self._coming:
                    return
                self._now = self._coming[0][0]
                continue
            self._one_step()

    def _one_step(self) -> None:
        self._step += 1
        step, cache = self._step, self._cache
        preempted = False
        needed = self._needing[step % cache.block_tokens]
        if needed > cache.free:
            preempted = self._decode_with_preemption()
        elif needed:
            cache.take(needed)
        # Chunks: request, tokens computed before, tokens now.
        chunks: list[tuple[int, int, int]] = []
        budget = self._budget - self._decoding
        if self._partial >= 0:
            preempted |= self._continue_prompt(budget, chunks)
            budget -= sum(tokens for _, _, tokens in chunks)
        if not preempted and self._waiting and self._partial < 0:
            self._admit(budget, chunks)
        prefill = pairs = whole = 0.0
        for i, before, tokens in chunks:
            prefill += tokens
            pairs += tokens * (before + tokens / 2)
            whole += tokens * (self._prompt[i] + self._produced[i] + tokens / 2)
        batch = Batch(
            prefill, self._decoding, len(chunks), self._decoding, pairs, whole, self._context,
            len(self._waiting), len(self._running), cache.usage,
        )  # fmt: skip
        end = self._now + self._duration(batch)
        self._rows.append((self._now, end - self._now, *batch))
        self._regimes.append(self._regime)
        self._context += self._decoding
        self._now = end
        ended = self._ending.pop(step, [])
        for i in ended:
            # A request that was preempted meanwhile ends in another step.
            if self._ends[i] == step:
                self._leave_decode(i, step + 1)
                self._finish(i, end)
        for i, before, tokens in chunks:
            if before + tokens == self._prompt[i] + self._produced[i]:
                self._prompt_done(i, step, end)

    def _duration(self, batch: Batch) -> float:
        seconds = float(self.step_time(batch) if self._timed is None else self._timed.at(batch, self._now / self._ticks))
        if not 0 < seconds < float("inf"):
            raise InputError(
                f"the step time of step {self._step} is {seconds} s; a step takes a finite time above 0. Its batch: {batch}"
            )
        self._times.append(seconds)
        return max(1, int(seconds * _MICRO + _ROUNDING_US)) if self.settings.whole_microseconds else seconds

    def _decode_with_preemption(self) -> bool:
        """Give blocks to decoding requests in their order, preempting from the end while there are none; whether it came to that."""
        cache, size, step = self._cache, self._cache.block_tokens, self._step
        preempted = False
        for i in list(self._running):
            if self._joined[i] < 0 or (self._computed[i] + step - self._joined[i]) % size:
                continue
            while cache.free < 1:
                preempted = True
                last = next(reversed(self._running))
                self._preempt(last)
                if last == i:
                    return True
            cache.take(1)
        return preempted

    def _preempt(self, i: int) -> None:
        del self._running[i]
        if self._joined[i] >= 0:
            # Its last token has been produced but not computed: it is part of what is computed anew.
            context = self._leave_decode(i, self._step)
        else:
            context = self._computed[i]
            self._partial = -1
        self._release(i, context)
        self._computed[i] = 0
        self._journeys[i].preemptions += 1
        self._waiting.appendleft(i)

    def _leave_decode(self, i: int, step: int) -> int:
        """Take a request out of the decoding ones before `step`; returns its context."""
        size = self._cache.block_tokens
        gained = step - self._joined[i]
        context = self._computed[i] + gained
        self._produced[i] += gained
        self._decoding -= 1
        self._context -= context
        self._needing[(self._joined[i] - self._computed[i]) % size] -= 1
        self._joined[i] = self._ends[i] = -1
        self._computed[i] = context
        return context

    def _release(self, i: int, context: int) -> None:
        self._cache.release(self._group[i], self._cache.blocks_for(context) - self._shared_blocks[i])
        self._shared_blocks[i] = 0

    def _continue_prompt(self, budget: int, chunks: list[tuple[int, int, int]]) -> bool:
        """Schedule the next chunk of the prompt under way; whether it had to be preempted for want of blocks."""
        i = self._partial
        before = self._computed[i]
        tokens = min(self._prompt[i] + self._produced[i] - before, budget)
        needed = self._cache.blocks_for(before + tokens) - self._cache.blocks_for(before)
        if needed > self._cache.free:
            # It is the last of the running requests, so the one to go.
            self._preempt(i)
            return True
        self._cache.take(needed)
        self._compute(i, before, tokens, chunks)
        return False

    def _compute(self, i: int, before: int, tokens: int, chunks: list[tuple[int, int, int]]) -> None:
        self._computed[i] = before + tokens
        if self._group[i] >= 0:
            self._shared_blocks[i] = self._cache.extend(self._group[i], self._shared_blocks[i], before + tokens)
        chunks.append((i, before, tokens))
        self._partial = i if before + tokens < self._prompt[i] + self._produced[i] else -1

    def _admit(self, budget: int, chunks: list[tuple[int, int, int]]) -> None:
        """Take waiting requests while there are slots, tokens and blocks."""
        cache, waiting = self._cache, self._waiting
        while waiting and budget > 0 and len(self._running) < self._seqs:
            i = waiting[0]
            group, total = self._group[i], self._prompt[i] + self._produced[i]
            found = cache.found(group, total) if group >= 0 else 0
            cached = found * cache.block_tokens if group >= 0 else min(max(self._given[i], 0), total - 1)
            tokens = total - cached
            if tokens > budget and not self._chunked:
                return
            tokens = min(tokens, budget)
            idle = cache.in_free_list(group, found) if group >= 0 else 0
            held = total if self.settings.reserve_whole_prompt else cached + tokens
            if cache.blocks_for(held) - found + idle > cache.free:
                return
            waiting.popleft()
            if group >= 0:
                cache.use(group, found)
                self._shared_blocks[i] = found
            cache.take(cache.blocks_for(cached + tokens) - found)
            journey = self._journeys[i]
            if math.isnan(journey.scheduled):
                journey.scheduled, journey.cached = self._now, cached
            self._running[i] = None
            self._compute(i, cached, tokens, chunks)
            budget -= tokens

    def _prompt_done(self, i: int, step: int, end: float) -> None:
        """Count the token that the end of a prefill brings, and let the request decode from the next step on."""
        journey = self._journeys[i]
        if not self._produced[i]:
            journey.first_token = end + self._per_token
        self._produced[i] += 1
        left = self._output[i] - self._produced[i]
        if not left:
            self._finish(i, end)
            return
        self._joined[i] = step + 1
        self._ends[i] = step + left
        self._ending.setdefault(step + left, []).append(i)
        self._decoding += 1
        self._context += self._computed[i]
        self._needing[(step + 1 - self._computed[i]) % self._cache.block_tokens] += 1

    def _finish(self, i: int, end: float) -> None:
        del self._running[i]
        self._release(i, self._computed[i])
        finished = end + self._output[i] * self._per_token + self._after
        self._journeys[i].finished = finished
        if self.requests.concurrency is not None:
            self._send(finished)

    # What came of it.

    @property
    def now_s(self) -> float:
        """The clock: while a step time is asked for, when the step starts."""
        return self._now / self._ticks

    @property
    def sent(self) -> int:
        """Number of requests sent."""
        return len(self._journeys)

    @property
    def times_s(self) -> NDArray[np.float64]:
        """What the step-time function gave for each step, before it was cut to microseconds, shape (n,)."""
        return np.array(self._times)

    def steps(self) -> pd.DataFrame:
        """Return the steps as rows of a step trace."""
        frame = pd.DataFrame(np.array(self._rows, dtype=float), columns=["start_s", "step_time_s", *Batch._fields])
        frame[["start_s", "step_time_s"]] /= self._ticks
        frame.insert(0, "step_id", np.arange(len(frame), dtype=np.int64))
        return frame.assign(regime=np.array(self._regimes, dtype=object))

    def journeys(self) -> pd.DataFrame:
        """Return the requests that were sent as rows of a request trace, in the order of the requests given."""
        index = np.array(sorted(self._journeys), dtype=np.int64)
        found = [self._journeys[i] for i in index]
        ticks = self._ticks
        times = {
            f"{name}_s": np.array([getattr(j, name) for j in found], dtype=float) / ticks
            for name in ("arrival", "queued", "scheduled", "first_token", "finished")
        }
        requests = self.requests
        return pd.DataFrame(
            {
                "request_id": requests.request_id[index],
                **times,
                "prompt_tokens": requests.prompt_tokens[index],
                "output_tokens": requests.output_tokens[index],
                "cached_tokens": [j.cached for j in found],
                "waiting_requests": [j.waiting for j in found],
                "running_requests": [j.running for j in found],
                "kv_usage": [j.kv_usage for j in found],
                "preemptions": [j.preemptions for j in found],
                "regime": requests.regime[index],
            }
        )
