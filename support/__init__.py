"""Plumbing that the stages share, one subject a file. It imports model.py and nothing above it."""
