"""What resume-stream costs, side by side with its peers and its limits: ``python -m bench``."""
