"""Weights in and out: Hugging Face directories, GGUF files, exports."""
