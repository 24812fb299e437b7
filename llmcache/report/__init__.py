"""Reports: statistics of a cache, the page of `llmcache report`, and HTML for notebooks."""
