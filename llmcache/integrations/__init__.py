"""Stand-ins for the embeddings of other libraries; each needs the extra of its name."""
