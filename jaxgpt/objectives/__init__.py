"""Losses, one file each: (params, batch, rng) -> (a sum, metrics as sums).

They know no optimizer and no mesh; the train step divides by the global weight.
"""
