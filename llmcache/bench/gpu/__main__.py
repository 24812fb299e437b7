"""`python -m llmcache.bench.gpu`: `llmcache bench gpu` where the command line's libraries are not installed."""

from llmcache.bench.gpu.runner import main

if __name__ == "__main__":
    main()
