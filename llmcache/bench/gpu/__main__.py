"""`python -m llmcache.bench.gpu`: `llmcache bench gpu` without the libraries of the command line."""

from llmcache.bench.gpu.runner import main

if __name__ == "__main__":
    main()
