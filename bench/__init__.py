"""Measure what resume-stream costs beside its peers and its limits: ``python -m bench``."""
