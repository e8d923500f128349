"""The decoder: its config, layers, attention, LoRA, and how much memory it takes.

All other rooms see plain functions over a plain pytree of parameters; flax.linen stays in here.
"""
