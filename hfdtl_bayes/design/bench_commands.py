"""A traffic plan as `vllm bench serve` command lines.

Options are those of vLLM's benchmark client with its `random` dataset (docs.vllm.ai, cli/bench/serve): lengths uniform from (1 - ratio) to
(1 + ratio) times their value, a fixed prefix in front, a Poisson process for a rate, and no rate (`inf`) under a limit of requests in
flight for a closed loop. `--ignore-eos` is said, so that outputs have the length asked for. Seeds differ between segments, or a prefix
cache would find the prompts of the one before.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from hfdtl_bayes.design.traffic_plan import PlannedSegment, TrafficPlan
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.files import atomic

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000


def bench_command(segment: PlannedSegment, model: str, *, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> list[str]:
    """Return the words of one command line.

    Parameters
    ----------
    segment : PlannedSegment
    model : str
        As the server knows it.
    host, port
        Where the server listens.

    Raises
    ------
    InputError
        If the model has no name or the port is none.
    """
    if not model.strip():
        raise InputError("vllm bench serve needs the name of the model as the server knows it; found an empty one")
    if not 1 <= port <= 65535:
        raise InputError(f"port is {port}; accepted are 1 to 65535")
    point = segment.traffic
    pace = {"--request-rate": "inf" if point.request_rate_per_s is None else f"{point.request_rate_per_s:g}"}
    if point.concurrency is not None:
        pace["--max-concurrency"] = str(point.concurrency)
    options = {
        "--host": host,
        "--port": str(port),
        "--model": model,
        "--dataset-name": "random",
        "--random-input-len": str(point.prompt_tokens),
        "--random-output-len": str(point.output_tokens),
        "--random-range-ratio": f"{point.range_ratio:g}",
        "--random-prefix-len": str(point.shared_prefix_tokens),
        **pace,
        "--num-prompts": str(segment.num_prompts),
        "--seed": str(segment.seed),
    }
    return ["vllm", "bench", "serve", *(word for pair in options.items() for word in pair), "--ignore-eos"]


def bench_script(plan: TrafficPlan, *, model: str | None = None, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> str:
    """Return a shell script that sends a plan, a command per segment, each with what it is expected to bring.

    Parameters
    ----------
    plan : TrafficPlan
    model : str, optional
        As the server knows it; the name in the configuration by default.
    host, port

    Raises
    ------
    InputError
        If the plan has no segments, or as `bench_command`.
    """
    if not plan.segments:
        raise InputError(
            f"the plan of {plan.config_id!r} has no segments to send: {plan.reason or 'a verdict is expected to accept as it is'}"
        )
    lines = [
        "#!/bin/sh",
        f"# Traffic for {_comment(plan.config_id)}: {plan.minutes:.1f} minutes in {len(plan.segments)} segment(s).",
        "set -e",
    ]
    for i, segment in enumerate(plan.segments, 1):
        lines += [
            "",
            f"# {i}: about {segment.cost_s:.0f} s; then the deployment mix is expected to be off by {segment.after.error:.1%}",
            shlex.join(bench_command(segment, model or plan.model, host=host, port=port)),
        ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Return a text that cannot end the comment it stands in."""
    return " ".join(text.split())


def write_bench_script(
    plan: TrafficPlan,
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
) -> Path:
    """Write `bench_script`, whole or not at all, so that it can be run; returns its path."""
    path = Path(path)
    text = bench_script(plan, model=model, host=host, port=port)
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
        part.chmod(part.stat().st_mode | 0o111)
    return path
