"""Which upstream deployments may be called: one breaker for the whole cluster."""
