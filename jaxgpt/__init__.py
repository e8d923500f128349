"""jaxgpt: the whole life of a GPT in JAX, from raw text to an aligned assistant."""

__version__ = "0.1.0"
