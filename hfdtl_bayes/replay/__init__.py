"""A replay of vLLM's continuous batching: requests in, batch compositions and request times out."""

from hfdtl_bayes.replay.batch import Batch, StepTime, TimedStepTime
from hfdtl_bayes.replay.requests import Requests
from hfdtl_bayes.replay.run import ReplayedRun, replay
from hfdtl_bayes.replay.settings import ReplaySettings, RequestOverheads
from hfdtl_bayes.replay.step_time import StepTimeFunction, linear_step_time, step_time_function
from hfdtl_bayes.replay.traffic import Lengths, Traffic, generate_requests

__all__ = [
    "Batch",
    "Lengths",
    "ReplaySettings",
    "ReplayedRun",
    "RequestOverheads",
    "Requests",
    "StepTime",
    "StepTimeFunction",
    "TimedStepTime",
    "Traffic",
    "generate_requests",
    "linear_step_time",
    "replay",
    "step_time_function",
]
