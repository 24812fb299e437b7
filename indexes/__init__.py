"""The vector database under LLMCache: files, segments, FAISS indexes. Knows nothing of transformers."""
