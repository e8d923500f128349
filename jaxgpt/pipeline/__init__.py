"""Several stages as data: their graph, what must hold of their results, and searches over their fields.

Nothing here starts a process; `experiments` runs the stages.
"""
