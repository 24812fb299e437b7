"""Measurements that anyone can repeat; `llmcache bench` prints them."""
