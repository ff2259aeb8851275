"""Texts of many callers, one provider call: gathered, sent, split again."""
