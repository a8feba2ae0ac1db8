"""A package, so that `tests.support` and `tests.bench` are this checkout's, whatever else calls itself tests."""
