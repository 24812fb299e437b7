"""The experiments of the paper (arXiv 2512.16843), measured with this implementation: `llmcache bench paper`."""
