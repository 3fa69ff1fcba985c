"""The vendors, played: an OpenAI-compatible server that fails by script, answers by seed, and keeps its own bill."""
