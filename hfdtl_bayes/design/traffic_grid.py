"""Traffic that may be sent next: a grid of paces, lengths and durations that the engine can serve, each replayed to know its steps.

A point of the grid is replayed once, for its longest duration; shorter durations are the beginning of it, since the first requests
are the same however many are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design.segments import Segment
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.replay import Lengths, ReplayedRun, ReplaySettings, StepTime, Traffic, replay

_CONCURRENCIES = (1, 4, 16, 64, 256)
_PROMPTS = (64, 512, 4096)
_OUTPUTS = (16, 256)
_PREFIX = 1024


@dataclass(frozen=True)
class TrafficPoint:
    """One kind of traffic for one duration, in the terms of `vllm bench serve` with random data.

    Attributes
    ----------
    prompt_tokens, output_tokens : int
        Middle of their uniform ranges; prompts come after the shared prefix.
    duration_s : float
        How long requests are sent; those in flight then are still answered.
    request_rate_per_s : float or None
        Open loop, Poisson.
    concurrency : int or None
        Closed loop: requests in flight.
    shared_prefix_tokens : int
    range_ratio : float
        Lengths are uniform from (1 - ratio) to (1 + ratio) times their middle.
    """

    prompt_tokens: int
    output_tokens: int
    duration_s: float
    request_rate_per_s: float | None = None
    concurrency: int | None = None
    shared_prefix_tokens: int = 0
    range_ratio: float = 0.5

    @property
    def name(self) -> str:
        """A label without blanks: pace, prompt and output tokens, prefix."""
        pace = f"c{self.concurrency}" if self.request_rate_per_s is None else f"r{self.request_rate_per_s:g}"
        return f"{pace}-p{self.prompt_tokens}-o{self.output_tokens}" + (
            f"-x{self.shared_prefix_tokens}" if self.shared_prefix_tokens else ""
        )

    def traffic(self, duration_s: float | None = None) -> Traffic:
        """Return what to replay, for this or another duration."""
        return Traffic(
            Lengths.around(self.prompt_tokens, self.range_ratio),
            Lengths.around(self.output_tokens, self.range_ratio),
            request_rate_per_s=self.request_rate_per_s,
            concurrency=self.concurrency,
            shared_prefix_tokens=self.shared_prefix_tokens,
            duration_s=self.duration_s if duration_s is None else duration_s,
            name=self.name,
        )

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, shared prefix included."""
        return self.shared_prefix_tokens + math.ceil(self.prompt_tokens * (1 + self.range_ratio))

    @property
    def longest_request(self) -> int:
        """Tokens of the longest prompt and output together."""
        return self.longest_prompt + math.ceil(self.output_tokens * (1 + self.range_ratio))


def why_not_served(point: TrafficPoint, configuration: ServingConfiguration, settings: ReplaySettings | None = None) -> str:
    """Return why an engine cannot serve some traffic; empty if it can."""
    request = f"requests of up to {point.longest_request} tokens (prompt {point.longest_prompt})"
    for limit, tokens in _rooms(configuration, settings).items():
        if point.longest_request > tokens:
            return f"{request} exceed {limit.format(tokens=tokens)}"
    return ""


def _rooms(configuration: ServingConfiguration, settings: ReplaySettings | None = None) -> dict[str, int]:
    """Return how many tokens a request may have, by what limits it."""
    settings, engine = settings or ReplaySettings(), configuration.engine
    blocks = int(engine.kv_capacity_tokens // settings.block_tokens) - settings.reserved_blocks
    rooms = {
        "the context of {tokens} tokens": configuration.llm.max_context_tokens,
        "the {tokens} tokens that the KV cache holds": blocks * settings.block_tokens,
    }
    if not engine.chunked_prefill:
        rooms["max_num_batched_tokens ({tokens}), and chunked prefill is off"] = engine.max_num_batched_tokens
    return rooms


@dataclass(frozen=True)
class TrafficGrid:
    """Values to combine: every pace with every prompt, output, prefix and duration.

    Attributes
    ----------
    request_rates_per_s : tuple of float
        Open loops; may be empty beside `concurrencies`.
    concurrencies : tuple of int
        Closed loops.
    prompt_tokens, output_tokens, shared_prefix_tokens : tuple of int
    durations_s : tuple of float
    range_ratio : float
        Lengths are uniform from (1 - ratio) to (1 + ratio) times their value: of lengths all alike, requests would start and end
        together, and steps would be of few kinds.
    """

    request_rates_per_s: tuple[float, ...] = ()
    concurrencies: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = _PROMPTS
    output_tokens: tuple[int, ...] = _OUTPUTS
    shared_prefix_tokens: tuple[int, ...] = (0,)
    durations_s: tuple[float, ...] = (10.0, 30.0)
    range_ratio: float = 0.5

    def __post_init__(self) -> None:
        """Refuse an empty grid and values that are no traffic.

        Raises
        ------
        InputError
            Names the list, the value, and what is accepted.
        """
        for f in fields(self):
            if f.name != "range_ratio":
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        if not (self.request_rates_per_s or self.concurrencies):
            raise InputError("the grid of traffic is empty: give at least one of request_rates_per_s and concurrencies")
        for name in ("prompt_tokens", "output_tokens", "shared_prefix_tokens", "durations_s"):
            if not getattr(self, name):
                raise InputError(f"the grid of traffic is empty: {name} lists no value; give at least one")
        for name, least in (("concurrencies", 1), ("prompt_tokens", 1), ("output_tokens", 1), ("shared_prefix_tokens", 0)):
            for value in getattr(self, name):
                if not (math.isfinite(value) and value == int(value) and value >= least):
                    raise InputError(f"{name} of the grid lists {value}; accepted are whole numbers from {least}")
        for name in ("request_rates_per_s", "durations_s"):
            for value in getattr(self, name):
                if not (math.isfinite(value) and value > 0):
                    raise InputError(f"{name} of the grid lists {value}; accepted are finite numbers above 0")
        if not 0 <= self.range_ratio < 1:
            raise InputError(f"range_ratio of the grid is {self.range_ratio}; accepted are numbers from 0 to below 1")

    @classmethod
    def for_engine(cls, configuration: ServingConfiguration, **changed: Any) -> TrafficGrid:
        """Return a grid that spans what an engine takes: closed loops up to its batch limit, prompts as its context and KV cache hold.

        Parameters
        ----------
        configuration : ServingConfiguration
        **changed
            Lists to put in place of those.
        """
        engine = configuration.engine
        most = engine.max_num_seqs
        made: dict[str, Any] = {
            "prompt_tokens": _PROMPTS,
            "output_tokens": _OUTPUTS,
            "shared_prefix_tokens": (0, _PREFIX) if engine.prefix_caching else (0,),
        }
        if "request_rates_per_s" not in changed:
            made["concurrencies"] = (*(c for c in _CONCURRENCIES if c < most), most)
        named = {k: v for k, v in changed.items() if v is not None}
        grid = cls(**{**made, **named})
        kept = {
            name: tuple(v for v in getattr(grid, name) if name in named or grid._served_with(name, v, configuration))
            for name in ("prompt_tokens", "output_tokens", "shared_prefix_tokens")
        }
        if not grid._served_with("prompt_tokens", min(grid.prompt_tokens), configuration):
            # An engine of little room: parts of it, for what was not asked for.
            room = int(min(_rooms(configuration).values()))
            little = {"prompt_tokens": (max(room // 4, 1),), "output_tokens": (max(room // 8, 1),), "shared_prefix_tokens": (0,)}
            kept = {name: named.get(name, values) for name, values in little.items()}
        return cls(**{**{f.name: getattr(grid, f.name) for f in fields(grid)}, **kept})

    def _served_with(self, name: str, value: int, configuration: ServingConfiguration) -> bool:
        smallest = {n: min(getattr(self, n)) for n in ("prompt_tokens", "output_tokens", "shared_prefix_tokens")} | {name: value}
        point = TrafficPoint(**smallest, duration_s=1.0, concurrency=1, range_ratio=self.range_ratio)
        return not why_not_served(point, configuration)

    def points(self, configuration: ServingConfiguration) -> tuple[list[TrafficPoint], list[str]]:
        """Return the points that an engine can serve, and why others cannot be.

        Raises
        ------
        InputError
            If a value that the grid lists is served in no combination.
        """
        served: list[TrafficPoint] = []
        reasons: dict[TrafficPoint, str] = {}
        for point in self._combinations():
            why = why_not_served(point, configuration)
            if why:
                reasons[point] = why
            else:
                served.append(point)
        lists = {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "shared_prefix_tokens": self.shared_prefix_tokens,
        }
        for name, values in lists.items():
            for value in values:
                if not any(getattr(p, name) == value for p in served):
                    why = next(w for p, w in reasons.items() if getattr(p, name) == value)
                    raise InputError(
                        f"{configuration.config_id!r} cannot serve {name} {value} of the grid: {why}. Leave it out, or give smaller "
                        "values beside it"
                    )
        return served, [f"{p.name}: {why}" for p, why in reasons.items()]

    def _combinations(self) -> Iterator[TrafficPoint]:
        paces: list[tuple[float | None, int | None]] = [(None, int(c)) for c in self.concurrencies]
        paces += [(float(r), None) for r in self.request_rates_per_s]
        for (rate, concurrency), prompt, output, prefix, duration in product(
            paces, self.prompt_tokens, self.output_tokens, self.shared_prefix_tokens, self.durations_s
        ):
            yield TrafficPoint(int(prompt), int(output), float(duration), rate, concurrency, int(prefix), self.range_ratio)

    def as_dict(self) -> dict[str, Any]:
        """Return the lists as plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ReplayedPoint:
    """A point of the grid and what a replay says of it.

    Attributes
    ----------
    point : TrafficPoint
    segment : Segment
        Its steps while requests are sent, and the seconds until the last is answered.
    num_prompts : int
        Requests sent.
    """

    point: TrafficPoint
    segment: Segment
    num_prompts: int


def replayed_points(
    points: Sequence[TrafficPoint], configuration: ServingConfiguration, step_time: StepTime, *, seed: int = 0
) -> list[ReplayedPoint]:
    """Replay points of a grid, those that differ in their duration alone together.

    A point of which no request is sent within its duration is left out.

    Parameters
    ----------
    points : sequence of TrafficPoint
    configuration : ServingConfiguration
    step_time : callable
        As of `replay`.
    seed : int
    """
    by_traffic: dict[str, list[TrafficPoint]] = {}
    for point in points:
        by_traffic.setdefault(f"{point.name} {point.range_ratio:g}", []).append(point)
    made: list[ReplayedPoint] = []
    for same in by_traffic.values():
        longest = max(p.duration_s for p in same)
        # With a rate the first request may come late; how many come is known beforehand only on average.
        if same[0].request_rate_per_s is not None and same[0].request_rate_per_s * longest < 1:
            continue
        run = replay(same[0].traffic(longest), configuration, step_time, seed=seed)
        made += [cut for p in same if (cut := _beginning(run, p, longest)) is not None]
    return made


def _beginning(run: ReplayedRun, point: TrafficPoint, longest_s: float) -> ReplayedPoint | None:
    """Return the part of a replayed run that a shorter duration has; None if it has nothing."""
    steps = run.steps[run.steps["start_s"] < point.duration_s]
    sent = int((run.requests["arrival_s"] < point.duration_s).sum())
    if steps.empty or not sent:
        return None
    answered = max(float(run.requests["finished_s"].max()) - longest_s, 0.0)
    return ReplayedPoint(point, Segment(point.name, steps, point.duration_s + answered), sent)
