"""Measures what the proxy costs, next to gateways that do less: `python -m tests.bench` (see `__main__.py` here)."""
