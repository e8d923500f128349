"""From a run to an artifact: average, merge, quantize, measure, prove and publish.

Nothing is published that does not read back as what was measured.
"""
