"""How the engine that is replayed keeps house, and what happens to a request outside its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfdtl_bayes.errors import InputError


@dataclass(frozen=True)
class RequestOverheads:
    """Times of a request that no step contains, in seconds; BLIS's alpha.

    Attributes
    ----------
    before_queue_s : float
        From arrival to the scheduler's queue when the engine is idle: alpha0. The mean of queued - arrival is more: it
        contains the rest of the running step, which the replay itself waits for.
    before_queue_s_per_prompt_token : float
        The same per token of the prompt: alpha1 of BLIS's blackbox, crossmodel and roofline backends.
    after_finish_s : float
        Once per request after its last token: alpha1 of trained-physics.
    per_output_token_s : float
        Per output token, without holding the engine up: alpha2.
    """

    before_queue_s: float = 0.0
    before_queue_s_per_prompt_token: float = 0.0
    after_finish_s: float = 0.0
    per_output_token_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative and infinite times.

        Raises
        ------
        InputError
            Naming the field.
        """
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} of the request overheads is {value}; accepted are finite numbers of seconds from 0")


@dataclass(frozen=True)
class ReplaySettings:
    """Rules of the engine that a serving configuration does not state; the defaults are vLLM's (V1).

    Attributes
    ----------
    block_tokens : int
        Tokens per block of the KV cache.
    reserved_blocks : int
        Blocks that hold no tokens: vLLM keeps one of its `kv_capacity_tokens` / `block_tokens`; BLIS's table of blocks has none.
    reserve_whole_prompt : bool
        True to admit a request only when its whole prompt fits in the free blocks, not only its first chunk.
    whole_microseconds : bool
        True to cut all times to whole microseconds, as BLIS does; a step then takes one at least.
    overheads : RequestOverheads
    """

    block_tokens: int = 16
    reserved_blocks: int = 1
    reserve_whole_prompt: bool = True
    whole_microseconds: bool = False
    overheads: RequestOverheads = RequestOverheads()

    def __post_init__(self) -> None:
        """Refuse sizes that are no counts.

        Raises
        ------
        InputError
            Naming the field.
        """
        for name, least in (("block_tokens", 1), ("reserved_blocks", 0)):
            value = getattr(self, name)
            if not (value == int(value) and value >= least):
                raise InputError(f"{name} is {value}; accepted are whole numbers from {least}")
