"""How often `discover` finds a planted term, and how often it names one where nothing is missing.

    python benchmarks/discover.py ../shared/data/gpu_steps ../shared/data/vllm_cpu [--replications 200] [--jobs 2] [--out FILE.csv]

Every replication keeps the real batches of some configurations and simulates their step times anew from the fit of the feature set to
the real ones (scales at their mode): population coefficients from their posterior, fresh group effects of hardware and
configurations, noise and drift of the size that was measured, relative to the new means. Where a term is planted, its mean over the steps
that have it is 3 to 8 % of their time, and its coefficient differs between configurations by 25 %. The whole procedure runs, from the
scaling of rows to the held-out check. A term counts as found if it is named or in the set "one of these" of a term named; beside it
stands how often it is the one named first, and how large the sets are. Seconds are of one processor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from hfdtl_bayes.features import candidate, candidate_names, feature_set
from hfdtl_bayes.model.exact import population_loading
from hfdtl_bayes.statistics import config_to_constant
from hfdtl_bayes.traces import TraceStore, time_blocks
from hfdtl_bayes.transfer import usable_rows
from hfdtl_bayes.transfer.discovery import usable_candidates
from hfdtl_bayes.transfer.term_evidence import Model, Problem, Traces, model
from hfdtl_bayes.transfer.term_search import DiscoverySettings, Search, search

GPU = (
    "llama3-8b_h100-sxm_tp1_vllm0.24.0",
    "mixtral-8x7b_h100-sxm_tp2_vllm0.24.0",
    "llama3-8b_a100-sxm_tp1_vllm0.14.0",
)
CPU = (
    "c01_llama-s_base", "c02_llama-s_seqs8", "c03_llama-s_seqs128", "c07_llama-s_fp32", "c09_llama-m_base", "c11_moe_base",
    "c13_qwen-s_base", "c14_llama-s_tightkv",
)  # fmt: skip
SCENES = {
    "gpu": ("gpu_steps", GPU),
    "gpu target": ("gpu_steps", GPU[:1]),
    "cpu": ("vllm_cpu", CPU),
    "cpu target": ("vllm_cpu", CPU[:1]),
}
"""Designs by name: which store of those given, by its folder's name, and which configurations."""
PLANTS = (
    "prefill_kv_usage", "prefill_decode", "decode_kv_usage", "decode_squared", "kv_usage_squared", "prefill_waiting",
    "waiting_kv_usage", "waiting", "has_prefill", "full_budget", "decode_above_64", "decode_above_128",
)  # fmt: skip
"""Interactions, steps and hinges to plant, where the traces can have them."""
SMALLEST, MIDDLE, LARGEST = 0.03, 0.05, 0.08
"""Mean share of a planted term in the time of the steps that have it."""
UNLIKE = 0.25
"""Relative sd of a planted coefficient between configurations."""
FEWEST_ACTIVE = 0.02
"""Share of all rows that must have a term for it to be planted."""
MOST_DRAWS = 1000
"""Draws of group effects tried until every step is slower than its weights can be read."""


@dataclass(frozen=True)
class Scene:
    """A problem on real batches with what is needed to simulate its step times."""

    problem: Problem
    fitted: Model
    design: tuple[np.ndarray, ...]
    scale: tuple[np.ndarray, ...]

    @property
    def plants(self) -> list[str]:
        """Terms that can be planted: enough rows have them, and the largest share needs no coefficient beyond the prior range."""
        names = {c.name for c in self.problem.candidates}
        found = []
        for n in (p for p in PLANTS if p in names):
            relative = self.relative(n, self.scale)
            active = relative != 0
            most = self.problem.candidate(n).feature.prior.high
            if active.mean() >= FEWEST_ACTIVE and LARGEST / relative[active].mean() <= most:
                found.append(n)
        return found

    def relative(self, name: str, scale: Sequence[np.ndarray]) -> np.ndarray:
        """Return a candidate's column over the scale of the step, over all configurations."""
        columns = [t.column(self.problem.candidate(name).feature) for t in self.problem.traces]
        return np.concatenate([c / s for c, s in zip(columns, scale, strict=True)])


@cache
def scene(store: str, configs: tuple[str, ...], features: str) -> Scene:
    """Prepare a scene once per process."""
    opened = TraceStore(store)
    chosen = feature_set(features)
    read = [(usable_rows(opened.steps(c).frame, opened.configuration(c), chosen), opened.configuration(c)) for c in configs]
    kept, _ = usable_candidates([candidate(n) for n in candidate_names()], chosen, read)
    columns = [*chosen.features, *(c.feature for c in kept)]
    problem = Problem.of(chosen, kept, [Traces.of(f, c, columns, 20) for f, c in read])
    design = [problem.features.design(t.frame, t.configuration) for t in problem.traces]
    scale = [
        problem.scaling(t, problem.features, problem.features).mean_s(x) for t, x in zip(problem.traces, design, strict=True)
    ]
    return Scene(problem, model(problem, problem.statistics(), ()), tuple(design), tuple(scale))


def drawn_means(on: Scene, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the mean step times of configurations like those fitted, group effects drawn anew; none faster than its weights are read."""
    density, features = on.fitted.density, on.problem.features
    centre, covariance = (v[0] for v in density.population(on.fitted.mode[None]))
    scales = density.draw(on.fitted.mode[None], rng)
    tau, share = scales["tau"][0] * density.scale, float(scales["hardware_share"][0])
    configurations = [t.configuration for t in on.problem.traces]
    for _ in range(MOST_DRAWS):
        phi = rng.multivariate_normal(centre, covariance)
        effects = {c.hardware.name: np.sqrt(share) * tau * rng.standard_normal(len(tau)) for c in configurations}
        theta = [
            population_loading(features, config_to_constant(features, c)) @ phi
            + effects[c.hardware.name]
            + np.sqrt(1 - share) * tau * rng.standard_normal(len(tau))
            for c in configurations
        ]
        means = [x @ t for x, t in zip(on.design, theta, strict=True)]
        if all(m.min() > features.noise_floor(c) for m, c in zip(means, configurations, strict=True)):
            return means
    raise RuntimeError("the fitted population hardly ever gives possible step times")


def simulated(on: Scene, planted: str | None, share: float, rng: np.random.Generator) -> Problem:
    """Return the problem with step times simulated from the fit, and a term of mean share `share` planted or none."""
    means = drawn_means(on, rng)
    scale = means
    if planted is not None:
        relative = on.relative(planted, means)
        coefficient = share / relative[relative != 0].mean()
        columns = [t.column(on.problem.candidate(planted).feature) for t in on.problem.traces]
        scale = [m + coefficient * (1 + UNLIKE * rng.standard_normal()) * c for m, c in zip(means, columns, strict=True)]
    sigma, omega = on.fitted.errors
    traces = []
    for c, t in enumerate(on.problem.traces):
        blocks = time_blocks(t.frame, t.block_length)
        drift = omega[c] * rng.standard_normal(int(blocks[-1]) + 1)
        errors = drift[blocks] + sigma[c] * rng.standard_normal(len(blocks))
        # A step takes some time, however the normal falls.
        observed = np.maximum(scale[c] * (1 + errors), 0.1 * means[c])
        traces.append(replace(t, frame=t.frame.assign(step_time_s=observed)))
    return replace(on.problem, traces=tuple(traces))


def outcome(found: Search, planted: str | None) -> dict[str, object]:
    """Score one search."""
    sets = [{n for n, _ in f.one_of} for f in found.terms]
    hit = [s for s in sets if planted in s]
    return {
        "named": len(found.terms),
        "found": bool(hit),
        "first": any(f.name == planted for f in found.terms),
        "others": sum(planted not in s for s in sets),
        "set": len(hit[0]) if hit else 0,
        "names": " ".join(f.name for f in found.terms),
        "rejected": " ".join(f.name for f in found.rejected),
    }


def replication(
    store: str, configs: tuple[str, ...], features: str, planted: str | None, seed: int, settings: DiscoverySettings
) -> dict[str, object]:
    """Simulate once and search."""
    on = scene(store, configs, features)
    rng = np.random.default_rng([seed, 0 if planted is None else 1 + PLANTS.index(planted)])
    share = float(rng.uniform(SMALLEST, LARGEST))
    problem = simulated(on, planted, share, rng)
    started = time.process_time()
    found = search(problem, settings)
    return {
        "planted": planted or "",
        "share": share,
        "seed": seed,
        "seconds": time.process_time() - started,
        **outcome(found, planted),
    }


def rates(results: pd.DataFrame) -> pd.DataFrame:
    """Return the share of replications with each outcome, by scene and by what was planted."""
    rows = []
    for (name, planted), own in results.groupby(["scene", "planted"], sort=False):
        rows.append(_rates(str(name), str(planted) or "nothing", own))
    for name, own in results[results["planted"] != ""].groupby("scene", sort=False):
        for low, high in ((SMALLEST, MIDDLE), (MIDDLE, LARGEST), (SMALLEST, LARGEST)):
            inside = own[own["share"].between(low, high)]
            if len(inside):
                rows.append(_rates(str(name), f"any, {low:.0%} to {high:.0%}", inside))
    return pd.DataFrame(rows)


def _rates(name: str, planted: str, own: pd.DataFrame) -> dict[str, object]:
    something = planted != "nothing"
    return {
        "scene": name,
        "planted": planted,
        "n": len(own),
        "found": own["found"].mean() if something else np.nan,
        "named first": own["first"].mean() if something else np.nan,
        "median set": own.loc[own["found"], "set"].median() if something else np.nan,
        "largest set": own["set"].max() if something else np.nan,
        "names another": (own["others"] > 0).mean(),
        "seconds": own["seconds"].median(),
    }


def run(
    stores: Sequence[Path], scenes: Sequence[str], features: str, replications: int, jobs: int, settings: DiscoverySettings
) -> pd.DataFrame:
    """Run all replications: as many with nothing planted as with something, the plants in turn."""
    by_name = {p.name: str(p) for p in stores}
    work = []
    for name in scenes:
        folder, configs = SCENES[name]
        if folder not in by_name:
            continue
        plants = scene(by_name[folder], configs, features).plants
        for seed in range(replications):
            work += [(name, by_name[folder], configs, planted, seed) for planted in (None, plants[seed % len(plants)])]
    rows, started = [], time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(replication, s, c, features, p, seed, settings): n for n, s, c, p, seed in work}
        for done, future in enumerate(as_completed(futures), 1):
            rows.append({"scene": futures[future], **future.result()})
            print(f"\r{done}/{len(work)}, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return pd.DataFrame(rows).sort_values(["scene", "planted", "seed"])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--scenes", nargs="+", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--features", default="roofline")
    parser.add_argument(
        "--replications", type=int, default=200, help="with nothing planted, and as many with something, per scene"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="write every replication as CSV")
    arguments = parser.parse_args()
    results = run(
        arguments.stores, arguments.scenes, arguments.features, arguments.replications, arguments.jobs, DiscoverySettings()
    )
    if arguments.out:
        results.to_csv(arguments.out, index=False)
    print(rates(results).round(3).to_markdown(index=False))


if __name__ == "__main__":
    main()
