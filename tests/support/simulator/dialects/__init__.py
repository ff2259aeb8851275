"""Four wire formats over one question (`Ask`) and one answer (`Reply`)."""
