"""Evaluation of a finished model: tasks, metrics with their intervals, win-rates, and the report card of a reward model.

Results are plain objects for JSON; `reporting` shows them.
"""
