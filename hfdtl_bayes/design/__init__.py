"""What to measure next: acquisition functions over rows of a pool, greedy selection at once or in rounds."""

from hfdtl_bayes.design.acquisition import Acquisition
from hfdtl_bayes.design.rounds import Rounds, select_in_rounds
from hfdtl_bayes.design.selection import Selection, SelectionSettings, select_rows

__all__ = ["Acquisition", "Rounds", "Selection", "SelectionSettings", "select_in_rounds", "select_rows"]
