"""Demonstration data that is made on the spot, without a download: texts of Python's own library, and sums.

`experiments.make_data` writes it; the quickstart and the examples train on it.
"""
