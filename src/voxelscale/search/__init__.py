"""Asynchronous parallel Bayesian optimisation of any of the config's keys."""
