"""Bayesian hierarchical calibration of LLM serving latency."""
