"""Training of retrievers with language models that expand queries (ExpandR), in JAX."""

import os

# Importing transformers, for its tokenizers, would advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
