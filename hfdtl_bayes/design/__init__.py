"""What to measure next: acquisition functions over rows of a pool, greedy selection."""

from hfdtl_bayes.design.acquisition import Acquisition
from hfdtl_bayes.design.selection import Selection, SelectionSettings, select_rows

__all__ = ["Acquisition", "Selection", "SelectionSettings", "select_rows"]
