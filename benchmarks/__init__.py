"""Measurements: each file is one question, one run, printed as ratios."""
