"""A served model per module, and one per test whose worker the test starts itself."""

import jax
import pytest

pytest.importorskip("httpx")
pytest.importorskip("starlette")

from jaxgpt import partition  # noqa: E402
from jaxgpt.models import decoder  # noqa: E402
from tests.serving.tiny import CFG, make  # noqa: E402


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: partition.unbox(decoder.init_params(CFG, jax.random.key(0))))()


@pytest.fixture(scope="module")
def served(params):
    made = make(params)
    made.worker.start()
    yield made
    made.worker.stop()


@pytest.fixture
def idle(params):
    """A server whose worker the test starts itself."""
    made = make(params)
    yield made
    if made.worker._thread.ident is None:
        made.worker.start()
    made.worker.stop()
