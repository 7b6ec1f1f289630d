"""Training of retrievers with language models that expand queries (ExpandR), in JAX."""
