"""Guards around providers, shared by every worker: `gate` (breaker, limits and budget of each), `cache`, `backoff`."""
