"""`simulate` on BLIS: one process of a binary that the user names per run, on all cores.

BLIS has no drift and no noise: its coefficients, all of them factors of the step time, are multiplied by one factor per run. Its spread is
that of the mean speed over the middle-most phase of the workload, so phases are right and a run of many phases is a little too wide.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.export import ExportSettings, blis_hardware_config
from hfdtl_bayes.export.blis import Projector
from hfdtl_bayes.export.vectors import BlisVectors, check_vectors
from hfdtl_bayes.features import operating_points
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.replay import ReplaySettings, RequestOverheads, Requests, Traffic, generate_requests, replay, step_time_function
from hfdtl_bayes.simulation.blis_files import huggingface_config, replayed_requests, run_requests, short_name, write_trace_v2
from hfdtl_bayes.simulation.ensemble import (
    EnsembleSettings,
    Metrics,
    RunPlan,
    Simulation,
    coefficient_seconds,
    collect,
    run_plans,
    serve,
)
from hfdtl_bayes.simulation.metrics import MetricSettings, run_metrics
from hfdtl_bayes.simulation.overheads import OverheadDraws
from hfdtl_bayes.simulation.speed import SpeedDrift
from hfdtl_bayes.simulation.workload import Workload

MICRO = 1e6
_SLOWEST_FACTOR = 0.2
_AFTER_LAST_US = 24 * 3600 * 1_000_000
"""Horizon behind the last arrival: BLIS's own, twice the last arrival, drops what a slow draw has not finished by then, in silence."""
_SAID = 3
"""Last lines of what a failed process said that are shown."""

_ALTERNATIVES = {
    "seqs": ("--max-num-seqs", "--max-num-running-reqs"),
    "tokens": ("--max-num-batched-tokens", "--max-num-scheduled-tokens"),
    "blocks": ("--total-kv-blocks",),
    "block": ("--block-size-in-tokens", "--block-size"),
}
"""Flags that had other names in other versions, newest first."""
_NEEDED = (
    "--alpha-coeffs",
    "--beta-coeffs",
    "--latency-model",
    "--model-config-folder",
    "--hardware-config",
    "--hardware",
    "--tp",
)


@dataclass(frozen=True)
class BlisSettings:
    """How the binary is run.

    Attributes
    ----------
    jobs : int
        Processes at a time; 0 for one per core.
    timeout_s : float
        Of one run.
    block_tokens : int
        Tokens per block of the KV cache.
    """

    jobs: int = 0
    timeout_s: float = 600.0
    block_tokens: int = 16

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be.

        Raises
        ------
        InputError
            Naming the field.
        """
        for name, least in (("jobs", 0), ("block_tokens", 1)):
            value = getattr(self, name)
            if not (value == int(value) and value >= least):
                raise InputError(f"{name} is {value}; accepted are whole numbers from {least}")
        if not self.timeout_s > 0:
            raise InputError(f"timeout_s is {self.timeout_s}; accepted are seconds above 0")


@dataclass(frozen=True)
class BlisBinary:
    """A `blis` that can do what is asked of it.

    Attributes
    ----------
    path : Path
    verb : str
        "replay" or "run".
    flags : frozenset of str
        That `blis VERB --help` names.
    """

    path: Path
    verb: str
    flags: frozenset[str]

    @classmethod
    def of(cls, path: Path, verb: str = "replay") -> BlisBinary:
        """Look at a binary.

        Raises
        ------
        MissingInputError
            If there is no such file.
        InputError
            If it cannot be run, has no such command, or lacks trained-physics or a flag that it takes.
        """
        path = path.absolute()
        if not path.is_file():
            raise MissingInputError(
                f"no blis at {path}; build it with `go build -o blis main.go` in inference-sim, or use --engine builtin"
            )
        if not os.access(path, os.X_OK):
            raise InputError(f"{path} may not be executed; chmod +x it")
        done = _run([str(path), verb, "--help"], 30.0, path.parent)
        text = done.stdout + done.stderr
        flags = frozenset(word.strip("`,=[]()") for word in text.split() if word.startswith("--"))
        wanted = _NEEDED + (("--trace-header", "--trace-data", "--results-path") if verb == "replay" else ("--metrics-path",))
        missing = [f for f in wanted if f not in flags] + [names[0] for names in _ALTERNATIVES.values() if not flags & set(names)]
        if done.returncode or not flags:
            raise InputError(f"{path} has no command {verb!r}: is it blis, and of 2026? It said: {_last(text)}")
        if missing:
            raise InputError(
                f"{path} is too old (or too new): `{path.name} {verb}` knows no {', '.join(missing)}; build a current one"
            )
        if "trained-physics" not in text:
            raise InputError(
                f"{path} is too old: --latency-model of `{path.name} {verb}` does not name trained-physics, for which the coefficients are"
            )
        return cls(path, verb, flags)

    def flag(self, meaning: str) -> str:
        """Return this binary's name of a flag that had several."""
        return next(f for f in _ALTERNATIVES[meaning] if f in self.flags)

    def __call__(self, arguments: Sequence[str], folder: Path, timeout_s: float) -> None:
        """Run it.

        Raises
        ------
        InputError
            If it fails or takes too long, with the last it said.
        """
        done = _run([str(self.path), self.verb, *arguments], timeout_s, folder)
        if done.returncode:
            raise InputError(f"blis exited with {done.returncode}: {_last(done.stderr or done.stdout)}")


def _run(command: list[str], timeout_s: float, folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{Path(command[0]).name} did not end within {timeout_s:g} s; give it longer (--timeout), or less traffic"
        ) from None
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run: {error.strerror or error}; is it built for this machine?") from None


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-_SAID:]) or "nothing"


def server_arguments(binary: BlisBinary, configuration: ServingConfiguration, folder: Path, settings: BlisSettings) -> list[str]:
    """Write what BLIS needs to know of model and hardware into a folder; returns the arguments that describe the server."""
    name, engine = short_name(configuration), configuration.engine
    model = folder / "models" / name / "config.json"
    model.parent.mkdir(parents=True)
    model.write_text(json.dumps(huggingface_config(configuration), indent=2), encoding="utf-8")
    (folder / "hardware.json").write_text(blis_hardware_config(configuration), encoding="utf-8")
    blocks = int(engine.kv_capacity_tokens) // settings.block_tokens - 1
    return [
        "--model", f"simulate/{name}", "--model-config-folder", str(folder / "models"), "--hardware-config", str(folder / "hardware.json"),
        "--hardware", configuration.hardware.name, "--tp", str(engine.tensor_parallel), "--latency-model", "trained-physics",
        binary.flag("seqs"), str(engine.max_num_seqs), binary.flag("tokens"), str(engine.max_num_batched_tokens),
        binary.flag("blocks"), str(blocks), binary.flag("block"), str(settings.block_tokens),
    ]  # fmt: skip


def coefficient_arguments(vectors: BlisVectors, factor: float, overheads: RequestOverheads) -> list[str]:
    """Return the coefficients of a run: all betas times the machine's factor, which BLIS then applies to every step."""
    alpha = (overheads.before_queue_s * MICRO, overheads.after_finish_s * MICRO, overheads.per_output_token_s * MICRO)
    beta = [factor * b for b in vectors.beta]
    return ["--alpha-coeffs", ",".join(f"{a:.9g}" for a in alpha), "--beta-coeffs", ",".join(f"{b:.9g}" for b in beta)]


def simulate_with_blis(
    posterior: LatencyPosterior,
    configuration: ServingConfiguration,
    workload: Workload | Path,
    binary_path: Path,
    *,
    drift: SpeedDrift | None = None,
    overheads: OverheadDraws | None = None,
    settings: EnsembleSettings | None = None,
    metrics: MetricSettings | None = None,
    blis: BlisSettings | None = None,
    seed: int = 0,
    on_member: Callable[[], None] | None = None,
) -> Simulation:
    """Serve a workload with BLIS, by an ensemble of posterior draws projected onto its trained-physics backend.

    Parameters
    ----------
    posterior, configuration, drift, overheads, settings, metrics, seed, on_member
        As `simulate`.
    workload : Workload or path
        A path is a workload file of BLIS (`blis run --workload-spec`), whose requests BLIS draws itself by the seed of each run.
    binary_path : path
    blis : BlisSettings, optional

    Raises
    ------
    MissingInputError
        If the binary or the workload file does not exist.
    InputError
        If the binary is too old, or half of the runs fail; fewer are counted in `Simulation.failed`.
    ExportError
        If BLIS's basis cannot express the posterior.
    """
    settings, metrics, blis = settings or EnsembleSettings(), metrics or MetricSettings(), blis or BlisSettings()
    drift, overheads = drift or SpeedDrift.blocks_only(), overheads or OverheadDraws.fixed(RequestOverheads())
    if isinstance(workload, Path) and not workload.is_file():
        raise MissingInputError(f"no workload file at {workload}")
    binary = BlisBinary.of(binary_path, "run" if isinstance(workload, Path) else "replay")
    stand_in = Workload(traffic=(Traffic(1, 1, 1.0, num_requests=1),)) if isinstance(workload, Path) else workload
    plans = run_plans(posterior, configuration, stand_in, overheads, drift, settings, seed)

    steps = pd.DataFrame()
    duration_s, blocks = 60.0, 60.0
    if not isinstance(workload, Path):
        runs = [_reference(posterior, configuration, part, blis, seed) for part in stand_in.parts]
        steps = pd.concat(runs, ignore_index=True)
        by_phase = [own for run in runs for _, own in run.groupby("regime")]
        duration_s = float(
            np.median([own["start_s"].iloc[-1] - own["start_s"].iloc[0] + own["step_time_s"].iloc[-1] for own in by_phase])
        )
        blocks = max(float(np.median([len(own) for own in by_phase])) / drift.block_length, 1.0)
    projector = Projector.of(posterior, configuration, steps if len(steps) else None, settings=ExportSettings(), seed=seed)
    found = posterior.draws(configuration, seed)
    check_vectors(projector.vectors(found.mean), ExportSettings())

    with tempfile.TemporaryDirectory(prefix="hfdtl-blis-") as name:
        folder = Path(name)
        server = server_arguments(binary, configuration, folder, blis)

        def engine(plan: RunPlan) -> Metrics:
            vectors = projector.vectors(found.theta[plan.draw], floor=True)
            check_vectors(vectors, ExportSettings())
            sd = drift.mean_factor_sd(float(found.omega[plan.draw]), duration_s, blocks)
            factor = 1.0 + plan.level + sd * float(np.random.default_rng(plan.speed_seed).standard_normal())
            given = [*server, *coefficient_arguments(vectors, max(factor, _SLOWEST_FACTOR), plan.overheads)]
            own = folder / f"run-{plan.member}-{plan.workload}-{plan.speed}"
            own.mkdir()
            if isinstance(workload, Path):
                arguments = [*given, "--workload-spec", str(workload.absolute()), "--seed", str(plan.workload_seed)]
                binary([*arguments, "--metrics-path", str(own / "metrics.json")], own, blis.timeout_s)
                return run_metrics(run_requests(own / "metrics.json"), metrics)
            result: dict[tuple[str, str], float] = {}
            for k, part in enumerate(workload.parts):
                result |= serve(part, metrics, lambda p, k=k: _replayed(binary, given, p, own / str(k), plan, blis))  # type: ignore[misc]
            return result

        jobs = blis.jobs or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:
            rows, failed = collect(engine, plans, pool.map, on_member)
    # Without a reference run, over all batches that the engine can run.
    batches = steps if len(steps) else operating_points(configuration)
    seconds = coefficient_seconds(posterior, configuration, batches, plans, seed)
    said = f"BLIS workload {workload.name}" if isinstance(workload, Path) else str(workload)
    return Simulation(
        configuration.config_id, "blis", said, settings, rows, {}, seconds, steps, drift, posterior.feature_set, failed, seed
    )  # fmt: skip


def _reference(
    posterior: LatencyPosterior, configuration: ServingConfiguration, part: Requests | Traffic, blis: BlisSettings, seed: int
) -> pd.DataFrame:
    """Return the steps of a run at the posterior mean: which batches the vectors are to be right for, and how long phases last."""
    expected = step_time_function(posterior, configuration, seed=seed)
    return replay(part, configuration, expected, seed=seed, settings=ReplaySettings(block_tokens=blis.block_tokens)).steps


def _replayed(
    binary: BlisBinary, given: Sequence[str], part: Requests | Traffic, folder: Path, plan: RunPlan, blis: BlisSettings
) -> pd.DataFrame:
    requests = part if isinstance(part, Requests) else generate_requests(part, seed=plan.workload_seed)
    # A TraceV2 begins with its first request.
    requests = replace(requests, arrival_s=requests.arrival_s - requests.arrival_s.min())
    folder.mkdir()
    header, data = write_trace_v2(requests, folder, plan.workload_seed)
    horizon = int(requests.arrival_s.max() * MICRO) + _AFTER_LAST_US
    arguments = [*given, "--trace-header", str(header), "--trace-data", str(data), "--results-path", str(folder / "results.json")]
    arguments += ["--seed", str(plan.workload_seed), "--horizon", str(horizon)]
    binary(arguments, folder, blis.timeout_s)
    return replayed_requests(folder / "results.json", requests)
