"""Eight simulated CPU devices and one shared compilation cache, set before jax starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling costs far more than running here, and unoptimized programs compile three times faster.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", ""))).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
