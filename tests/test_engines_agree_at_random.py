"""The engines agree on random problems: a file of its own, so that it runs beside `test_engines_agree`."""

from __future__ import annotations

import pytest
from agreement import RANDOM
from test_engines_agree import SECOND, compared, passed


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(SECOND))
def test_engines_agree_on_random_problems(engine: str) -> None:
    found, refused = compared(engine, tuple(RANDOM))
    assert not refused
    assert passed(found), str(found)
