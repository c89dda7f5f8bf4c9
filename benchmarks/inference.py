"""One model, one data set, many ways to its posterior: what each costs and whether they agree.

    python benchmarks/inference.py ../shared/data/gpu_steps [--rows-per-donor 10000] [--donors ID ...] [--methods exact pymc_nutpie ...]
        [--draws-factor 1] [--limit SECONDS] [--seed N] [--out FILE.csv]

Five donors of composed GPU steps, their batches drawn again with replacement and fresh noise of 5 %, in a temporary trace store.
`inference_methods.py` says what each method is. All have the model without drift, whose integral a user of other packages would have
to write by hand; our engines run once more with it (their default). Every method runs in a process of its own, one at a time, chains
in sequence, one thread of linear algebra, with an empty folder for compiled code. Seconds are of that process: `cold` everything, from
its start to its exit, imports and the reading of the traces included; `compile` and `sample` (warm-up included) are parts of it. ESS is
the bulk ESS (Vehtari et al. 2021, doi:10.1214/20-BA1221) of the worst of all parameters. Competitors draw less where they are
slow; what counts is ESS per CPU second.

Agreement is with the exact engine on the same model: largest difference of posterior means over parameters of the kind, in
posterior sds; of sds, relative; and both over their Monte Carlo error, the largest of all (of about 150 parameters, near 3 where
nothing differs). For point estimates only the first exists.

A second table times `hfdtl-bayes fit` on the store as a cold process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hfdtl_bayes.traces import STEP_SCHEMA, TraceStore, drop_warmup, write_store

HERE = Path(__file__).resolve().parent
DONORS = (
    "llama3-8b_h100-sxm_tp1_vllm0.24.0",
    "llama3-8b_a100-sxm_tp1_vllm0.14.0",
    "qwen3-30b-a3b_h100-sxm_tp2_vllm0.24.0",
    "qwen3-14b_h100-sxm_tp2_vllm0.24.0",
    "llama3-70b_a100-sxm_tp4_vllm0.14.0",
)
"""Dense and mixture of experts, on two GPUs, with and without tensor parallelism. Not Mixtral: on ten thousand of its rows the little
that the dense part hides in a step makes up for what the experts' features miss, and the posterior has two modes far apart
(deviation of `gemm_hidden` about 0.5, or 12 to 20), between which chains move rarely; ESS then says little of an engine's speed."""
NOISE = 0.05


@dataclass(frozen=True)
class Line:
    """A line of the table: a method and how long it samples; the reference of speed is `pymc_nutpie`."""

    title: str
    method: str
    draws: int = 500
    tune: int = 200
    chains: int = 8
    drift: bool = False

    @property
    def key(self) -> str:
        """Name on the command line."""
        return f"{self.method}_drift" if self.drift else self.method


LINES = (
    Line("exact engine", "exact"),
    Line("PyMC engine, pseudo-rows", "pymc"),
    Line("rows engine, Gaussian", "rows", 500, 200, 2),
    Line("PyMC on rows, nutpie", "pymc_nutpie", 1000, 500, 2),
    Line("PyMC on rows, its own NUTS", "pymc_nuts", 500, 500, 2),
    Line("NumPyro on rows", "numpyro", 500, 500, 2),
    Line("Bambi, nutpie", "bambi", 500, 500, 2),
    Line("statsmodels MixedLM, REML", "mixedlm"),
    Line("the design's RidgeCV", "ridge"),
    Line("exact engine, drift", "exact", drift=True),
    Line("PyMC engine, pseudo-rows, drift", "pymc", drift=True),
    Line("rows engine, Gaussian, drift", "rows", 500, 200, 2, drift=True),
)
KINDS = {"population": ("beta", "gamma", "delta"), "group sds": ("tau",), "coefficients": ("theta",)}


def make_store(source: Path, target: Path, rows: int, seed: int, donors: Sequence[str] = DONORS) -> None:
    """Write the donors' store: batches drawn with replacement, kept in order so that regimes stay together, and fresh noise."""
    store, names = TraceStore(source), [c.name for c in STEP_SCHEMA]
    for i, config_id in enumerate(donors):
        rng = np.random.default_rng([seed, i])
        frame = drop_warmup(store.steps(config_id).frame)
        frame = frame.iloc[np.sort(rng.integers(len(frame), size=rows))].reset_index(drop=True)
        times = frame["expected_step_time_s"] * (1 + NOISE * rng.standard_normal(rows))
        frame = frame.assign(step_id=np.arange(rows), step_time_s=times)
        write_store(target, store.configuration(config_id), frame[[n for n in names if n in frame]])


@dataclass(frozen=True)
class Usage:
    """What a process took: wall and CPU seconds, peak memory in MiB, and whether it was stopped at the limit."""

    wall: float
    cpu: float
    peak_mib: float
    code: int
    stopped: bool
    errors: str


def peak_mib(pid: int) -> float:
    """Return the largest resident set of a running process so far, MiB; 0 where the system does not say (other than Linux).

    The usage that `wait4` returns will not do: its peak is at least that of the process that started the command.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def measured(command: list[str], limit: float) -> Usage:
    """Run a command in a cold process and measure it with the children it waits for.

    Each has its own empty folder of compiled code and one thread of linear algebra.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as compiled, tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | threads | {
            "PYTENSOR_FLAGS": f"base_compiledir={compiled}",
            "NUMBA_CACHE_DIR": f"{compiled}/numba",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
            "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        stopped, peak = False, 0.0
        while True:
            peak = max(peak, peak_mib(process.pid))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if not stopped and time.perf_counter() - began > limit:
                os.killpg(process.pid, signal.SIGKILL)
                stopped = True
            time.sleep(0.02)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read()
    return Usage(wall, usage.ru_utime + usage.ru_stime, peak, process.returncode, stopped, said)


def monte_carlo(draws: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean, sd, their Monte Carlo errors, bulk ESS and R-hat of draws of shape (chain, draw, P), each of shape (P,)."""
    from arviz_stats.base import array_stats  # noqa: PLC0415  (loads for a second)

    axes = {"chain_axis": 0, "draw_axis": 1}
    return {
        "mean": draws.mean(axis=(0, 1)),
        "sd": draws.std(axis=(0, 1), ddof=1),
        "mean_error": array_stats.mcse(draws, method="mean", **axes),
        "sd_error": array_stats.mcse(draws, method="sd", **axes),
        "ess": array_stats.ess(draws, method="bulk", **axes),
        "rhat": array_stats.rhat(draws, **axes),
    }


def flattened(draws: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Return some variables side by side, shape (chain, draw, P)."""
    return np.concatenate([draws[n].reshape(*draws[n].shape[:2], -1) for n in names], axis=2)


def agreement(draws: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return by how much two samples of one posterior differ.

    Parameters
    ----------
    draws, reference : mapping
        Variables by name, shape (chain, draw, ...). Of `draws` also point estimates, without the first two.

    Returns
    -------
    dict
        By kind of parameter "mean KIND", the largest difference of means in sds of the reference, and "sd KIND", the largest
        relative difference of sds; "z mean" and "z sd", the largest over all these parameters in units of their joint Monte Carlo error.
    """
    found: dict[str, float] = {}
    z: dict[str, list[float]] = {"z mean": [], "z sd": []}
    for kind, wanted in KINDS.items():
        names = [n for n in wanted if n in draws and n in reference]
        if not names:
            continue
        r = monte_carlo(flattened(reference, names))
        if draws[names[0]].ndim < reference[names[0]].ndim:
            estimate = np.concatenate([draws[n].ravel() for n in names])
            found[f"mean {kind}"] = float(np.max(np.abs(estimate - r["mean"]) / r["sd"]))
            continue
        d = monte_carlo(flattened(draws, names))
        means, sds = np.abs(d["mean"] - r["mean"]), np.abs(d["sd"] - r["sd"])
        found |= {f"mean {kind}": float(np.max(means / r["sd"])), f"sd {kind}": float(np.max(sds / r["sd"]))}
        z["z mean"].append(np.max(means / np.hypot(d["mean_error"], r["mean_error"])))
        z["z sd"].append(np.max(sds / np.hypot(d["sd_error"], r["sd_error"])))
    return found | {name: float(np.max(values)) for name, values in z.items() if values}


def run_line(
    line: Line, store: Path, folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run a method; returns its line of the table and its draws."""
    out = folder / f"{line.key}.npz"
    draws, tune = (max(50, int(n * arguments.draws_factor)) for n in (line.draws, line.tune))
    command = [sys.executable, str(HERE / "inference_methods.py"), line.method, str(store), str(out)]
    command += [f"--draws={draws}", f"--tune={tune}", f"--chains={line.chains}", f"--seed={arguments.seed}"]
    usage = measured(command + ["--drift"] * line.drift, arguments.limit)
    row: dict[str, Any] = {
        "method": line.title, "draws": f"{line.chains} x {draws}", "cold wall": usage.wall, "cold CPU": usage.cpu, "MiB": usage.peak_mib
    }  # fmt: skip
    if usage.stopped or usage.code:
        row["note"] = f"stopped at {arguments.limit:.0f} s" if usage.stopped else f"failed: {usage.errors.strip()[-300:]}"
        return row, {}
    record = json.loads(out.with_suffix(".json").read_text())
    found = dict(np.load(out))
    for stage in ("compile", "sample"):
        for kind, label in (("wall", "wall"), ("cpu", "CPU")):
            row[f"{stage} {label}"] = record["seconds"].get(stage, {}).get(kind, 0.0)
    if "divergences" not in record:
        row["draws"] = "estimate"
        row["note"] = "" if record.get("converged", True) else f"not converged ({', '.join(record['warnings'])})"
        return row, found
    everything = monte_carlo(flattened(found, [n for n in found if n != "hardware_effect_z" and found[n].size]))
    least = float(everything["ess"].min())
    row |= {
        "parameters": len(everything["ess"]),
        "min ESS": least,
        "R-hat": float(everything["rhat"].max()),
        "divergent": record["divergences"],
        "gradients/draw": record["gradients_per_draw"],
        "ESS/s sample": least / row["sample CPU"],
        "ESS/s + compile": least / (row["sample CPU"] + row["compile CPU"]),
        "ESS/s cold": least / row["cold CPU"],
    }
    return row, found


def command_line(store: Path, donors: Sequence[str], folder: Path, limit: float, repeats: int = 3) -> pd.DataFrame:
    """Time `hfdtl-bayes fit` on the store, and importing what it needs, as cold processes."""
    fit = ["-m", "hfdtl_bayes", "fit", str(store), "--donors", ",".join(donors), "--json", "--out", str(folder / "donors.nc")]
    commands = {"import hfdtl_bayes.transfer": ["-c", "import hfdtl_bayes.transfer"], "hfdtl-bayes fit": fit}
    rows = []
    for name, command in commands.items():
        runs = [measured([sys.executable, *command], limit) for _ in range(repeats)]
        failed = next((r.errors[-300:] for r in runs if r.code), "")
        walls, cpus = [r.wall for r in runs], [r.cpu for r in runs]
        rows.append({
            "cold process": name, "wall, median": np.median(walls), "wall, worst": max(walls), "CPU, median": np.median(cpus),
            "MiB": max(r.peak_mib for r in runs), "failed": failed,
        })  # fmt: skip
    return pd.DataFrame(rows)


def cell(value: object) -> str:
    """Return a cell of the table: three digits, empty for what a method does not have."""
    if isinstance(value, float):
        if not np.isfinite(value):
            return ""
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="trace store with the donors, shared/data/gpu_steps")
    parser.add_argument("--donors", nargs="+", default=list(DONORS), help="config_ids of the source")
    parser.add_argument("--rows-per-donor", type=int, default=10_000)
    parser.add_argument("--methods", nargs="+", choices=[line.key for line in LINES], default=[line.key for line in LINES])
    parser.add_argument("--draws-factor", type=float, default=1.0, help="multiplies draws and warm-up of every sampler")
    parser.add_argument("--limit", type=float, default=1800.0, help="wall seconds after which a method is stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write the table as CSV")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    reference: dict[bool, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Path(name, "store")
        make_store(arguments.source, store, arguments.rows_per_donor, arguments.seed, arguments.donors)
        for line in (chosen for chosen in LINES if chosen.key in arguments.methods):
            print(f"\r{line.title:40s}", end="", file=sys.stderr, flush=True)
            row, draws = run_line(line, store, folder, arguments)
            if line.method == "exact":
                reference[line.drift] = draws
            elif draws and line.drift in reference:
                row |= agreement(draws, reference[line.drift])
            rows.append(row)
        print(f"\r{'hfdtl-bayes fit':40s}", end="", file=sys.stderr, flush=True)
        fit = command_line(store, arguments.donors, folder, arguments.limit)
    print(f"\r{'':40s}\r", end="", file=sys.stderr)
    table = pd.DataFrame(rows)
    speeds = [c for c in table.columns if c.startswith("ESS/s")]
    base = table[table["method"] == "PyMC on rows, nutpie"]
    for speed in speeds if len(base) else ():
        table[f"x {speed}"] = table[speed] / base[speed].iloc[0]
    if arguments.out:
        table.to_csv(arguments.out, index=False)
    print(f"{len(arguments.donors)} donors x {arguments.rows_per_donor} rows, seconds, {os.cpu_count()} cores\n")
    shown = table.set_index("method").map(cell)
    print(shown.T.to_markdown(disable_numparse=True))
    print(f"\n{fit.map(cell).to_markdown(index=False, disable_numparse=True)}")


if __name__ == "__main__":
    main()
