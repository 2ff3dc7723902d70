"""Around fit(), the loop in train.py: a run and its state, several GPUs, what it will take, and the
flags, rows and models of finetune.py."""
