"""How good predictions are: overlap of masks, and lesions found against false positives."""
