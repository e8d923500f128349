"""Sampling from a model: `decode` is one jitted loop, for reinforcement learning and batches; `engine` serves requests that
come and go, a step at a time.

The other files draw tokens (`samplers`) and turn tokens into texts, streams and dialogues.
"""
