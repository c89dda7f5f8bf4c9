"""The library of candidate terms: formulas against counts by hand, what is refused, and a user's own in a few lines."""

from __future__ import annotations

import doctest
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import (
    QUANTITIES,
    Feature,
    Level,
    PriorRange,
    candidate,
    candidate_names,
    candidates,
    operating_points,
    physics,
    register_candidate,
)
from hfdtl_bayes.features.fingerprint import reference_configurations

DENSE, MOE, PCIE, CPU = reference_configurations()
EITHER_WAY = PriorRange(-1.0, 1.0)


@pytest.fixture
def forget() -> Iterator[None]:
    """Leave the registry as it was."""
    before = dict(candidates._CANDIDATES)
    yield
    candidates._CANDIDATES.clear()
    candidates._CANDIDATES.update(before)


def mine(level: Level = Level.RESIDUAL, prior: PriorRange = EITHER_WAY, name: str = "mine") -> Feature:
    return Feature(name, level, "request", "waiting_requests", lambda f, _c: f["waiting_requests"].to_numpy(float), prior,
                   ("waiting_requests",), 1e-4)  # fmt: skip


def values(name: str, configuration, **columns: float) -> float:
    frame = pd.DataFrame({c: [float(v)] for c, v in columns.items()})
    return float(np.asarray(candidate(name).feature.compute(frame, configuration))[0])


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_candidate_is_finite_centred_at_nothing_and_says_what_it_means(quantity: str) -> None:
    names = candidate_names(quantity)
    assert len(set(names)) == len(names) > 3
    for name in names:
        found = candidate(name, quantity)
        f = found.feature
        assert f.prior.low == -f.prior.high
        assert f.level in (Level.RESIDUAL, Level.CONFIG)
        assert found.meaning
        assert found.go
        for c in reference_configurations():
            frame = operating_points(c) if quantity == "step_time" else pd.DataFrame(
                {"waiting_requests": [0.0, 5.0], "kv_usage": [0.0, 0.9], "prompt_tokens": [10.0, 5000.0]}
            )  # fmt: skip
            column = np.asarray(f.compute(None if f.level is Level.CONFIG else frame, c), float)
            assert np.isfinite(column).all()
            assert (column >= 0).all(), name


def test_experts_tiles_are_counted_by_hand() -> None:
    # Few tokens: every hit expert computes one whole tile, 64 rows.
    tokens = 3.0
    hit = float(physics.distinct_experts(np.array([tokens]), MOE, physics.SETTINGS.routing_skew)[0])
    rows = hit * 64 - tokens * MOE.llm.num_experts_per_token
    expected = 2 * rows * MOE.llm.expert_params * MOE.llm.num_moe_layers / MOE.engine.tensor_parallel / physics.peak_flops(MOE)
    assert values("expert_tile_padding", MOE, prefill_tokens=0, decode_tokens=tokens) == pytest.approx(expected)
    assert values("expert_tile_padding", DENSE, prefill_tokens=0, decode_tokens=tokens) == 0.0
    assert values("expert_tile_padding", MOE, prefill_tokens=0, decode_tokens=0) == 0.0


def test_padding_is_less_than_a_tile_per_expert() -> None:
    tokens = np.arange(0.0, 5000.0, 7.0)
    frame = pd.DataFrame({"prefill_tokens": tokens, "decode_tokens": 0.0})
    routed, padded = candidates.expert_rows(frame, MOE)
    hit = physics.distinct_experts(tokens, MOE, physics.SETTINGS.routing_skew)
    assert (padded >= routed - 1e-6).all()
    assert (padded - routed <= 64 * hit + 1e-6).all()


def test_products_are_work_times_a_share() -> None:
    c = DENSE
    work = 1000 * c.llm.flops_per_token / c.hardware.peak_flops
    row = {"prefill_tokens": 1000, "decode_tokens": 64, "kv_usage": 0.5, "waiting_requests": 32}
    assert values("prefill_kv_usage", c, **row) == pytest.approx(0.5 * work)
    assert values("prefill_decode", c, **row) == pytest.approx(work * 64 / c.engine.max_num_seqs)
    assert values("prefill_squared", c, **row) == pytest.approx(work * 1000 / c.engine.max_num_batched_tokens)
    step = physics.reference_step_s(c)
    assert values("waiting_kv_usage", c, **row) == pytest.approx(step * 0.5 * 32 / c.engine.max_num_seqs)
    assert values("decode_above_64", c, **row) == 0.0
    assert values("decode_above_64", c, **{**row, "decode_tokens": 65}) == pytest.approx(step)
    assert values("full_budget", c, **{**row, "prefill_tokens": c.engine.max_num_batched_tokens - 64}) == pytest.approx(step)
    assert values("graph_padding", c, prefill_tokens=0, decode_tokens=13) == pytest.approx(3 * physics.GPU_HOST.sequence_s)
    assert values("graph_padding", c, prefill_tokens=5, decode_tokens=13) == 0.0


def test_only_replicated_heads_cost_replication() -> None:
    # Two KV heads: none replicated on one GPU, each on two of four GPUs.
    assert values("kv_replication", DENSE, context_tokens=1e5) == 0.0
    assert values("kv_replication", PCIE, context_tokens=1e5) == pytest.approx(values("kv_read", PCIE, context_tokens=1e5) / 2)


def test_a_user_registers_a_candidate_in_a_few_lines(forget: None) -> None:
    own = register_candidate(mine(), meaning="the scheduler walks its queue")
    assert candidate("mine") is own
    assert "mine" in candidate_names()
    assert "mine" not in candidate_names("queue_delay")
    with pytest.raises(InputError, match=r"'mine' for step_time exists.*replace=True"):
        register_candidate(mine())
    assert register_candidate(mine(), replace=True) is candidate("mine")


def test_the_example_of_the_documentation_runs(forget: None) -> None:
    ran = doctest.testmod(candidates)
    assert ran.attempted >= 3
    assert ran.failed == 0


def test_what_cannot_be_a_candidate_is_refused(forget: None) -> None:
    with pytest.raises(InputError, match=r"level base"):
        register_candidate(mine(Level.BASE))
    with pytest.raises(InputError, match=r"between 0 and 2; centre it at 0"):
        register_candidate(mine(prior=PriorRange(0.0, 2.0)))
    with pytest.raises(InputError, match=r"candidate of this package"):
        register_candidate(mine(name="kv_read"), replace=True)
    with pytest.raises(InputError, match=r"explains 'speed'; accepted quantities"):
        register_candidate(mine(), quantity="speed")
    with pytest.raises(UnknownNameError, match=r"unknown candidate 'kv_raed'.*kv_read"):
        candidate("kv_raed")
