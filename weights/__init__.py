"""Checkpoints in and out: Meta's folders, Hugging Face's folders, GGUF files; presets by name."""
from weights.load import load_config, load_model, with_rope
from weights.save import save_model
from weights.tokenizer import load_tokenizer

__all__ = ["load_config", "load_model", "load_tokenizer", "save_model", "with_rope"]
