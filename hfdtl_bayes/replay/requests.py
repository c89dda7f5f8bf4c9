"""The requests that a replay serves: when they are sent, how long they are, and which prefix they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

UNKNOWN_CACHED = -1
"""`cached_tokens` of a request whose hits in the prefix cache the replay itself is to find."""


def _left_out() -> NDArray[Any]:
    """Return the array of a field that was not given: filled with its default once the number of requests is known."""
    return np.zeros(0)


@dataclass(frozen=True)
class Requests:
    """Requests in the order in which they are sent.

    Attributes
    ----------
    arrival_s : ndarray, shape (n,)
        When each is sent, seconds, not decreasing. Under a `concurrency` limit the earliest time: it is held back until one of
        those before it has finished.
    prompt_tokens : ndarray of int, shape (n,)
        Whole prompts, shared prefix included; at least 1.
    output_tokens : ndarray of int, shape (n,)
        Tokens generated; at least 1. The first comes from the step that ends the prefill.
    shared_prefix_tokens : ndarray of int, shape (n,)
        Leading tokens of the prompt that are the same in all requests of a `prefix_group`; 0 where nothing is shared.
    prefix_group : ndarray of int, shape (n,)
        Which prefix it is.
    cached_tokens : ndarray of int, shape (n,)
        Prompt tokens found in the prefix cache, where a recording says so; -1 where the replay is to find out.
    request_id, regime : ndarray of str, shape (n,)
    concurrency : int or None
        Requests in flight at most, as ``--max-concurrency`` of vLLM's benchmark; None for no limit.
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    shared_prefix_tokens: IntArray = field(default_factory=_left_out)
    prefix_group: IntArray = field(default_factory=_left_out)
    cached_tokens: IntArray = field(default_factory=_left_out)
    request_id: NDArray[Any] = field(default_factory=_left_out)
    regime: NDArray[Any] = field(default_factory=_left_out)
    concurrency: int | None = None

    def __post_init__(self) -> None:
        """Fill what was left out and check everything.

        Raises
        ------
        InputError
            Naming the first request that cannot be, what it holds and what is accepted.
        """
        arrival = _floats("arrival_s", self.arrival_s)
        n = len(arrival)
        if n == 0:
            raise InputError("no requests to replay; give at least one")
        whole = {
            "prompt_tokens": (self.prompt_tokens, 1, 1),
            "output_tokens": (self.output_tokens, 1, 1),
            "shared_prefix_tokens": (self.shared_prefix_tokens, 0, 0),
            "prefix_group": (self.prefix_group, 0, 0),
            "cached_tokens": (self.cached_tokens, UNKNOWN_CACHED, UNKNOWN_CACHED),
        }
        for name, (values, least, default) in whole.items():
            given = np.full(n, float(default)) if len(values) == 0 else _floats(name, values)
            _same_length(name, given, n)
            bad = ~(np.isfinite(given) & (given >= least) & (given == np.floor(given)))
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise InputError(f"request {row}: {name} is {given[row]:g}; accepted are whole numbers from {least}")
            object.__setattr__(self, name, _read_only(given.astype(np.int64)))
        if not np.isfinite(arrival).all():
            row = int(np.flatnonzero(~np.isfinite(arrival))[0])
            raise InputError(f"request {row}: arrival_s is {arrival[row]}; give the time in seconds at which it is sent")
        late = np.flatnonzero(np.diff(arrival) < 0)
        if len(late):
            row = int(late[0]) + 1
            raise InputError(
                f"request {row} arrives at {arrival[row]:g} s, before request {row - 1} at {arrival[row - 1]:g} s; sort by arrival_s"
            )
        object.__setattr__(self, "arrival_s", _read_only(arrival))
        for name in ("shared_prefix_tokens", "cached_tokens"):
            _not_above(name, getattr(self, name), self.prompt_tokens)
        self._check_groups()
        names = [str(i) for i in range(n)] if len(self.request_id) == 0 else [str(r) for r in self.request_id]
        regimes = ["all"] * n if len(self.regime) == 0 else [str(r) for r in self.regime]
        for name, texts in (("request_id", names), ("regime", regimes)):
            _same_length(name, texts, n)
            object.__setattr__(self, name, _read_only(np.array(texts, dtype=object)))
        if len(set(names)) < n:
            repeated = next(r for r in names if names.count(r) > 1)
            raise InputError(f"request_id {repeated!r} occurs more than once; give each request its own")
        if self.concurrency is not None and not (self.concurrency == int(self.concurrency) and self.concurrency >= 1):
            raise InputError(f"concurrency is {self.concurrency}; accepted are whole numbers from 1, or None for no limit")

    def _check_groups(self) -> None:
        shares = self.shared_prefix_tokens > 0
        lengths = pd.Series(self.shared_prefix_tokens[shares]).groupby(self.prefix_group[shares]).nunique()
        if (lengths > 1).any():
            group = int(lengths.index[lengths > 1][0])
            raise InputError(
                f"prefix_group {group} has shared prefixes of {int(lengths[group])} lengths; requests of a group share one prefix: "
                "give each length a group of its own"
            )

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_s)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, *, concurrency: int | None = None) -> Requests:
        """Take the requests of a recording, in the order of their arrival.

        Parameters
        ----------
        frame : DataFrame
            Columns of a request trace: `arrival_s`, `prompt_tokens`, `output_tokens`; where present also `request_id`,
            `cached_tokens`, `regime`, and `shared_prefix_tokens` and `prefix_group`. An unknown `cached_tokens` is left to the replay.
        concurrency : int, optional

        Raises
        ------
        InputError
            If a column is missing, or a value is not accepted; requests are counted in the order of arrival.
        """
        missing = [c for c in ("arrival_s", "prompt_tokens", "output_tokens") if c not in frame.columns]
        if missing:
            raise InputError(
                f"requests to replay need the column(s) {', '.join(missing)}; found {', '.join(map(str, frame.columns))}"
            )
        frame = frame.sort_values("arrival_s", kind="stable")

        optional = ("shared_prefix_tokens", "prefix_group", "cached_tokens", "request_id", "regime")
        given = {name: frame[name].to_numpy() for name in optional if name in frame.columns}
        if "cached_tokens" in given:
            given["cached_tokens"] = frame["cached_tokens"].fillna(UNKNOWN_CACHED).to_numpy()
        return cls(
            arrival_s=frame["arrival_s"].to_numpy(),
            prompt_tokens=frame["prompt_tokens"].to_numpy(),
            output_tokens=frame["output_tokens"].to_numpy(),
            concurrency=concurrency,
            **given,
        )


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    values = values.copy()
    values.flags.writeable = False
    return values


def _floats(name: str, values: Any) -> FloatArray:
    try:
        found = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} of the requests is not a list of numbers: {error}") from None
    if found.ndim != 1:
        raise InputError(f"{name} of the requests has shape {found.shape}; give one number per request")
    return found


def _same_length(name: str, values: Any, n: int) -> None:
    if len(values) != n:
        raise InputError(f"{name} has {len(values)} values for {n} requests; give one per request")


def _not_above(name: str, values: IntArray, prompt: IntArray) -> None:
    above = np.flatnonzero(values > prompt)
    if len(above):
        row = int(above[0])
        raise InputError(f"request {row}: {name} is {values[row]}, more than its prompt of {prompt[row]} tokens")
