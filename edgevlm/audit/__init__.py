"""The audit: what precision every op of a written graph really ran in, and what it cost."""
