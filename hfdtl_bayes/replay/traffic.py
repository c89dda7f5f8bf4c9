"""Traffic as it is described to a benchmark client, and the requests it sends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay.requests import Requests

_LARGEST = 10_000_000
"""Requests of one traffic at most: beyond, a rate or a duration is in another unit than seconds."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of prompt or output lengths, in tokens; drawn lengths are whole numbers, at least 1.

    Made by `Lengths.fixed`, `Lengths.uniform`, `Lengths.around` or `Lengths.lognormal`.

    Parameters
    ----------
    kind : {"fixed", "uniform", "lognormal"}
    low, high : float
        Uniform: smallest and largest length, both drawn. Lognormal: lengths outside are brought to the nearer of the two. Fixed:
        both are the length.
    median, log_sd : float
        Of the lognormal: exp(mean) and sd of the logarithm.
    """

    kind: Literal["fixed", "uniform", "lognormal"]
    low: float
    high: float
    median: float = 0.0
    log_sd: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no length can be.

        Raises
        ------
        InputError
            If a bound is not a whole number from 1, the bounds are reversed, or the lognormal's parameters are not positive.
        """
        if self.kind not in ("fixed", "uniform", "lognormal"):
            raise InputError(f"lengths are {self.kind!r}; accepted are 'fixed', 'uniform' and 'lognormal'")
        for name, bound in (("low", self.low), ("high", self.high)):
            unbounded = name == "high" and self.kind == "lognormal" and bound == math.inf
            if not unbounded and not (math.isfinite(bound) and bound >= 1 and bound == math.floor(bound)):
                raise InputError(f"{name} of {self.kind} lengths is {bound:g} tokens; accepted are whole numbers from 1")
        if self.low > self.high:
            raise InputError(
                f"{self.kind} lengths from {self.low:g} to {self.high:g} tokens are no range; give the smaller one first"
            )
        if self.kind == "lognormal" and not (0 < self.median < math.inf and 0 <= self.log_sd < math.inf):
            raise InputError(
                f"lognormal lengths with median {self.median:g} and log_sd {self.log_sd:g}: the median is to be positive, log_sd "
                "not negative, both finite"
            )

    @classmethod
    def fixed(cls, tokens: float) -> Lengths:
        """Return lengths that are all the same."""
        return cls("fixed", tokens, tokens)

    @classmethod
    def uniform(cls, low: float, high: float) -> Lengths:
        """Return whole lengths from `low` to `high`, each as likely."""
        return cls("uniform", low, high)

    @classmethod
    def around(cls, tokens: float, range_ratio: float) -> Lengths:
        """Return uniform lengths as `vllm bench serve --random-range-ratio`: from tokens * (1 - ratio) to tokens * (1 + ratio).

        Raises
        ------
        InputError
            If the ratio is not from 0 to below 1.
        """
        if not 0 <= range_ratio < 1:
            raise InputError(f"range ratio is {range_ratio:g}; accepted are numbers from 0 to below 1")
        return cls("uniform", max(math.floor(tokens * (1 - range_ratio)), 1), math.ceil(tokens * (1 + range_ratio)))

    @classmethod
    def lognormal(cls, median: float, log_sd: float, *, low: float = 1, high: float = math.inf) -> Lengths:
        """Return lengths whose logarithm is normal, brought into [low, high]."""
        return cls("lognormal", low, high, median, log_sd)

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return `n` lengths, shape (n,); the first m of them do not depend on n for any m <= n."""
        if self.kind == "fixed":
            return np.full(n, int(self.low), dtype=np.int64)
        if self.kind == "uniform":
            return np.floor(self.low + rng.random(n) * (self.high - self.low + 1)).astype(np.int64)
        drawn = np.rint(self.median * np.exp(self.log_sd * rng.standard_normal(n)))
        return np.clip(drawn, self.low, min(self.high, 2**40)).astype(np.int64)


def _as_lengths(tokens: Lengths | float) -> Lengths:
    return tokens if isinstance(tokens, Lengths) else Lengths.fixed(tokens)


@dataclass(frozen=True)
class Traffic:
    """What to send: how many requests at what pace, and how long they are.

    Parameters
    ----------
    prompt_tokens, output_tokens : Lengths or number
        Tokens of each prompt after the shared prefix (as ``--random-input-len`` beside ``--random-prefix-len`` of vLLM's
        benchmark), and tokens generated.
    request_rate_per_s : float, optional
        Open loop: a Poisson process of this rate.
    concurrency : int, optional
        Closed loop: so many requests in flight; one is sent when another has finished. With a rate as well, the limit of requests
        in flight under that rate, as ``--max-concurrency``.
    shared_prefix_tokens : int
        Leading tokens that all prompts share, in front of `prompt_tokens`.
    duration_s : float, optional
        How long to send. Requests in flight then are still answered.
    num_requests : int, optional
        How many to send; give this or `duration_s`.
    name : str
        Label of the traffic: the regime of its steps and requests.
    """

    prompt_tokens: Lengths | float
    output_tokens: Lengths | float
    request_rate_per_s: float | None = None
    concurrency: int | None = None
    shared_prefix_tokens: int = 0
    duration_s: float | None = None
    num_requests: int | None = None
    name: str = "traffic"

    def __post_init__(self) -> None:
        """Refuse traffic that cannot be sent.

        Raises
        ------
        InputError
            Naming the field, what it holds and what is accepted.
        """
        object.__setattr__(self, "prompt_tokens", _as_lengths(self.prompt_tokens))
        object.__setattr__(self, "output_tokens", _as_lengths(self.output_tokens))
        if self.request_rate_per_s is None and self.concurrency is None:
            raise InputError("traffic needs request_rate_per_s (open loop) or concurrency (closed loop); give one")
        if (self.duration_s is None) == (self.num_requests is None):
            raise InputError("traffic ends after duration_s or after num_requests; give one of the two")
        for name in ("request_rate_per_s", "duration_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; accepted are finite numbers above 0")
        for name, least in (("concurrency", 1), ("num_requests", 1), ("shared_prefix_tokens", 0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value == int(value) and value >= least):
                raise InputError(f"{name} is {value}; accepted are whole numbers from {least}")
        expected = self.num_requests or (self.request_rate_per_s or 0.0) * (self.duration_s or 0.0)
        if expected > _LARGEST:
            raise InputError(
                f"traffic of {expected:.3g} requests; at most {_LARGEST:g} are replayed. Check the unit of rate and duration"
            )

    @property
    def closed_loop(self) -> bool:
        """Whether the engine sets the pace: a concurrency and no rate."""
        return self.request_rate_per_s is None


def generate_requests(traffic: Traffic, *, seed: int = 0, num_requests: int | None = None) -> Requests:
    """Draw the requests of a traffic.

    Intervals, prompts and outputs come from streams of their own, so that the first requests are the same however many are drawn.

    Parameters
    ----------
    traffic : Traffic
    seed : int
    num_requests : int, optional
        How many to draw in place of what the traffic says; needed for a closed loop with a duration, where the engine decides how
        many that is (`replay` of the traffic finds out).

    Raises
    ------
    InputError
        If the number is not known, or no request falls within the duration.
    """
    streams = [np.random.default_rng([seed, k]) for k in range(3)]
    count = num_requests or traffic.num_requests
    if traffic.request_rate_per_s is None:
        if count is None:
            raise InputError(
                "how many requests a closed loop sends within duration_s depends on the engine; give num_requests, or the traffic "
                "itself to replay"
            )
        arrival = np.zeros(count)
    else:
        arrival = _poisson(traffic.request_rate_per_s, count, traffic.duration_s, streams[0])
    n = len(arrival)
    shared = traffic.shared_prefix_tokens
    prompt, output = _as_lengths(traffic.prompt_tokens), _as_lengths(traffic.output_tokens)
    return Requests(
        arrival_s=arrival,
        prompt_tokens=shared + prompt.draw(n, streams[1]),
        output_tokens=output.draw(n, streams[2]),
        shared_prefix_tokens=np.full(n, shared),
        regime=np.full(n, traffic.name, dtype=object),
        concurrency=traffic.concurrency,
    )


def _poisson(rate: float, count: int | None, duration: float | None, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return arrival times of a Poisson process, so many or those before `duration`."""
    if count is not None:
        return np.cumsum(rng.exponential(1.0 / rate, count))
    assert duration is not None
    arrival = np.zeros(0)
    last = 0.0
    while last < duration:
        more = last + np.cumsum(rng.exponential(1.0 / rate, max(int(1.2 * rate * (duration - last)), 16)))
        arrival, last = np.concatenate([arrival, more]), float(more[-1])
    arrival = arrival[arrival < duration]
    if not len(arrival):
        raise InputError(
            f"no request arrives within {duration:g} s at {rate:g} requests/s with this seed; make duration_s longer or give num_requests"
        )
    return arrival
