"""Answers that exist already, and answers that somebody is getting just now."""
