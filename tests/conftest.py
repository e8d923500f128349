"""Eight simulated CPU devices and one shared compilation cache, set before jax starts; the same examples in every run."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling costs far more than running here, and unoptimized programs compile three times faster.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", ""))).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# The same examples in every run, and none refused because the machine was slow. HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

COLLECTED = pytest.StashKey[list[str]]()  # the ids in the order of the files, before they are shuffled


def pytest_itemcollected(item):
    item.config.stash.setdefault(COLLECTED, []).append(item.nodeid)


def pytest_terminal_summary(terminalreporter, config):
    seed = getattr(config.option, "randomly_seed", None)
    if isinstance(seed, int) and config.option.randomly_reorganize:
        terminalreporter.write_line(f"The tests ran in a random order; ARGS=--randomly-seed={seed} repeats it.")
