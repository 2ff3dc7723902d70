"""What eval.py and extras/ measure with: passes on all cores, grids of prompts, retrieval judged by
one pass, ranking, and generated text."""
