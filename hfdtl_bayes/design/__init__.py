"""What to measure next: acquisition functions over rows of a pool, greedy selection at once or in rounds."""

from hfdtl_bayes.design.acquisition import Acquisition
from hfdtl_bayes.design.closed_loop import ClosedLoop
from hfdtl_bayes.design.rounds import Rounds, select_in_rounds
from hfdtl_bayes.design.selection import Selection, SelectionSettings, select_rows
from hfdtl_bayes.design.traffic_grid import TrafficGrid, TrafficPoint
from hfdtl_bayes.design.traffic_plan import TrafficPlan, plan_traffic

__all__ = [
    "Acquisition",
    "ClosedLoop",
    "Rounds",
    "Selection",
    "SelectionSettings",
    "TrafficGrid",
    "TrafficPlan",
    "TrafficPoint",
    "plan_traffic",
    "select_in_rounds",
    "select_rows",
]
