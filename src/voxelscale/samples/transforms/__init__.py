"""The transforms of the augmentation, one a file: what each models, what it draws, its arithmetic."""
