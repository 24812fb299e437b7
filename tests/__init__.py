"""A package, so that `python -m tests.torture` and the test files share what they break a store with."""
