"""Sampling from a model: `decode` is one jitted loop over a batch, `engine` serves requests that come and go.

The other files draw tokens (`samplers`) and make texts, streams and dialogues of them.
"""
