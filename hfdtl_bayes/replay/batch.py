"""What a step of the engine computes, as the replay hands it to a step-time function."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable


class Batch(NamedTuple):
    """The composition of one step; fields and units as the columns of a step trace.

    A request's context in `context_tokens` is what was computed of it before the step, the convention of BLIS. `waiting_requests`,
    `running_requests` and `kv_usage` are the state while the step runs: after it was scheduled, before any request leaves.
    """

    prefill_tokens: float
    decode_tokens: float
    prefill_requests: float
    decode_requests: float
    prefill_attention_tokens: float
    """Sum over prefill chunks of t * (already computed + t / 2)."""
    prompt_attention_tokens: float
    """BLIS's count: sum over prefill chunks of t * (s + t / 2), s the whole prompt."""
    context_tokens: float
    waiting_requests: float
    running_requests: float
    kv_usage: float


StepTime = Callable[[Batch], float]
"""Seconds that a step of this composition takes."""


@runtime_checkable
class TimedStepTime(Protocol):
    """A step-time function that wants to know when a step begins: a machine whose speed drifts with the clock."""

    def __call__(self, batch: Batch) -> float:
        """Return the time of a step whenever it begins, seconds."""
        ...

    def at(self, batch: Batch, start_s: float) -> float:
        """Return the time of a step that begins at `start_s` of the requests' clock, seconds."""
        ...
