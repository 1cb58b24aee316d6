"""What audit.py runs: measure what experts are worth, and which criteria know it."""
