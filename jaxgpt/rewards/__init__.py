"""Rewards that are computed on the host: verifiers by name, and a user's own functions from a file.

They see texts and records alone, no arrays of a device; reinforcement learning and evaluation score responses with them.
"""
