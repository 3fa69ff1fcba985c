"""The vendors, played: a server that speaks OpenAI and Anthropic, fails by script, answers by seed, and keeps its own bill."""
