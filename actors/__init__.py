"""Who owns what is shared: one folder per concern, each with a policy, an owner and a desk."""
