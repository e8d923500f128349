"""Data from files to batches: sources, tokenizers, chat templates, records, packing, and the one global order of rows.

It is plain Python and numpy, a function of the config and the step alone; nothing here knows a model.
"""
