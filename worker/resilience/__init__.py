"""Guards around providers, shared by every worker: `backoff` (when to ask again), `breaker` (whom not to ask now)."""
