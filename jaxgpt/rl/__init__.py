"""Reinforcement learning: rollout, advantages, and an iteration of both with the train step as one jitted program.

Rewards that are computed on the host are in `rewards`, the losses in `objectives`.
"""
