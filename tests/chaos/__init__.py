"""Kills and faults under load: at reduced counts in every run, in full by one command."""
