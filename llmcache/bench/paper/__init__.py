"""The experiments of the paper (arXiv 2512.16843), run again: `llmcache bench paper`."""
