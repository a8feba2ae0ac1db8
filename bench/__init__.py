"""Measures what the proxy costs, next to gateways that do less: `python -m bench` (see `bench/__main__.py`)."""
