"""Vector database below LLMCache: files, segments, commits, FAISS indexes. It has no code about transformers."""
