"""Results for the eye: plots, report.html, model cards, and the reports of pipelines and sweeps.

They are made of the files that runs leave; statistics come from where a result was computed.
"""
