"""Corpora and their sources, tokenizers, training batches, passkey and needle prompts."""
