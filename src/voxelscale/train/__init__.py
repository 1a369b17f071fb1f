"""Training: the loop, its workers, its checkpoints and its log."""
