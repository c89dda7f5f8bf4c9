"""The KV cache of the replayed engine: blocks in use, and prefixes that requests share.

Only counts are kept, no block tables. Blocks of a shared prefix count once while any running request uses them. When the last one
leaves they stay findable in the free list, behind the blocks free by then, until so many blocks have been taken from it that it is
their turn; the end of the prefix goes first, as in vLLM. What other prefixes take back out of the list meanwhile is not followed, nor
are blocks that requests share otherwise (a preempted request finds nothing of itself again but the prefix; the last block of a prompt
that is nothing but prefix is computed anew and then taken for the prefix's).
"""

from __future__ import annotations

from collections.abc import Sequence


class BlockCache:
    """Counts of blocks.

    Parameters
    ----------
    blocks : int
        Usable blocks.
    block_tokens : int
    prefix_tokens : sequence of int
        Length of the prefix of each group; empty where nothing is shared or the engine does not cache prefixes.
    """

    def __init__(self, blocks: int, block_tokens: int, prefix_tokens: Sequence[int]) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.free = blocks
        self._whole = [tokens // block_tokens for tokens in prefix_tokens]  # only full blocks are shared
        self._held = [0] * len(prefix_tokens)
        self._users = [0] * len(prefix_tokens)
        self._due = [0] * len(prefix_tokens)  # blocks taken when those of an unused prefix begin to go
        self._taken = 0

    @property
    def usage(self) -> float:
        """Share of the blocks in use."""
        return 1.0 - self.free / self.blocks

    def take(self, blocks: int) -> None:
        """Take blocks out of the free list; there must be so many."""
        self.free -= blocks
        self._taken += blocks

    def blocks_for(self, tokens: int) -> int:
        """Return the blocks that hold so many tokens of one request."""
        return -(-tokens // self.block_tokens)

    def found(self, group: int, prompt_tokens: int) -> int:
        """Return the blocks of a prefix that a prompt finds; one token at least is left to compute."""
        held = self._held[group]
        if not self._users[group]:
            held -= min(max(self._taken - self._due[group], 0), held)
        return min(held, (prompt_tokens - 1) // self.block_tokens)

    def in_free_list(self, group: int, found: int) -> int:
        """Return how many of the blocks found are not in use and so count as free."""
        return 0 if self._users[group] else found

    def use(self, group: int, found: int) -> None:
        """Let one more request use the blocks it has found."""
        if not self._users[group]:
            self._held[group] = found
            self.free -= found
        self._users[group] += 1

    def extend(self, group: int, own: int, tokens: int) -> int:
        """Let the prefix grow to what a request has computed; returns how many of its blocks are the prefix's, `own` before."""
        reached = min(self._whole[group], tokens // self.block_tokens)
        if reached <= self._held[group]:
            return own
        self._held[group] = reached
        return reached

    def release(self, group: int, private: int) -> None:
        """Give back a request's own blocks, and its use of a prefix (group -1: none)."""
        self.free += private
        if group < 0:
            return
        self._users[group] -= 1
        if not self._users[group]:
            self._due[group] = self._taken + self.free
            self.free += self._held[group]
