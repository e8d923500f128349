"""A run as files: its workdir with config, metrics, checkpoints and manifest, and the artifact that is published from it.

Training writes these files, and every later stage starts from them; nothing here trains.
"""
