"""Benches beside the core: sweeps, RULER, needles, the evaluation harness. The core needs none."""
