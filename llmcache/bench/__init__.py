"""Repeatable measurements, printed by `llmcache bench`."""
