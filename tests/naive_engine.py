"""The rules of vLLM's scheduler written down naively: a list of blocks per request, an LRU list of free blocks, one token at a time.

An independent statement of what `hfdtl_bayes.replay` computes with counts. Time does not matter to it: requests come at given steps.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field


@dataclass
class NaiveRequest:
    number: int
    prompt: int
    output: int
    prefix: int = 0  # leading tokens shared by all that have the same number of them
    computed: int = 0
    produced: int = 0
    known: int = 0  # tokens known when it was last taken in: up to here it computes a prompt
    blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    cached: int | None = None

    @property
    def total(self) -> int:
        return self.prompt + self.produced


class NaiveEngine:
    def __init__(self, *, seqs: int, budget: int, blocks: int, size: int, chunked: bool, caching: bool, reserve: bool):
        self.seqs, self.budget, self.size, self.chunked = seqs, budget, size, chunked
        self.caching, self.reserve, self.blocks = caching, reserve, blocks
        self.free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(blocks))
        self.users = [0] * blocks
        self.key_of: dict[int, tuple[int, int]] = {}  # block -> (prefix, place)
        self.block_of: dict[tuple[int, int], int] = {}
        self.waiting: deque[NaiveRequest] = deque()
        self.running: list[NaiveRequest] = []

    def _found(self, r: NaiveRequest) -> list[int]:
        found: list[int] = []
        if self.caching:
            for place in range(min(r.prefix // self.size, (r.total - 1) // self.size)):
                block = self.block_of.get((r.prefix, place))
                if block is None:
                    break
                found.append(block)
        return found

    def _grow(self, r: NaiveRequest, tokens: int) -> bool:
        needed = -(-tokens // self.size) - len(r.blocks)
        if needed > len(self.free):
            return False
        for _ in range(needed):
            block, _ = self.free.popitem(last=False)
            if block in self.key_of:
                del self.block_of[self.key_of.pop(block)]
            self.users[block] = 1
            r.blocks.append(block)
        if self.caching:
            for place in range(min(r.prefix, tokens) // self.size):
                key = (r.prefix, place)
                if key not in self.block_of:
                    self.block_of[key], self.key_of[r.blocks[place]] = r.blocks[place], key
        return True

    def _release(self, r: NaiveRequest) -> None:
        for block in reversed(r.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None
        r.blocks = []

    def step(self) -> dict[str, object] | None:
        """One step; None if there is nothing to do."""
        if not self.running and not self.waiting:
            return None
        scheduled: list[tuple[NaiveRequest, int]] = []
        budget, preempted, place = self.budget, False, 0
        while place < len(self.running) and budget > 0:
            r = self.running[place]
            tokens = min(r.total - r.computed, budget)
            while not self._grow(r, r.computed + tokens):
                last = self.running.pop()
                self._release(last)
                last.computed = 0
                last.preemptions += 1
                self.waiting.appendleft(last)
                preempted = True
                if last is r:
                    break
            else:
                scheduled.append((r, tokens))
                budget -= tokens
                place += 1
                continue
            break
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.seqs:
            r = self.waiting[0]
            found = self._found(r)
            cached = len(found) * self.size
            tokens = r.total - cached
            if tokens > budget and not self.chunked:
                break
            tokens = min(tokens, budget)
            held = r.total if self.reserve else cached + tokens
            idle = sum(not self.users[b] for b in found)
            if -(-held // self.size) - len(found) + idle > len(self.free):
                break
            self.waiting.popleft()
            for block in found:
                if not self.users[block]:
                    del self.free[block]
                self.users[block] += 1
            r.blocks, r.computed, r.known = list(found), cached, r.total
            if r.cached is None:
                r.cached = cached
            assert self._grow(r, cached + tokens)
            self.running.append(r)
            scheduled.append((r, tokens))
            budget -= tokens
        prefills = [(r, t) for r, t in scheduled if r.computed < r.known]
        decodes = [r for r, _ in scheduled if r.computed >= r.known]
        row = {
            "prefill_tokens": sum(t for _, t in prefills),
            "decode_tokens": len(decodes),
            "prefill_requests": len(prefills),
            "prefill_attention_tokens": sum(t * (r.computed + t / 2) for r, t in prefills),
            "context_tokens": sum(r.computed for r in decodes),
            "waiting_requests": len(self.waiting),
            "running_requests": len(self.running),
            "kv_usage": sum(u > 0 for u in self.users) / self.blocks,
        }
        for r, tokens in scheduled:
            r.computed += tokens
            if r.computed == r.total:
                r.produced += 1
                if r.produced == r.output:
                    self.running.remove(r)
                    self._release(r)
        return row
