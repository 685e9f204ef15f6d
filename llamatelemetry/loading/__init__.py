"""Models and tokenizers from files: GGUF and transformers directories."""
