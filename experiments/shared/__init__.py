"""What the commands share: flags and configs, errors and signals, the course of a training run, and stages as processes.

No file here is a command of its own.
"""
