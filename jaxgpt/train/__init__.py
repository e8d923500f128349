"""Training, the same for every objective: optimizer, sharded state, step, loop, and a run put together of them.

What a run leaves on disk is in `runs`.
"""
