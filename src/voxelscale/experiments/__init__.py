"""Many trainings: what a search, a scaling study and cross-validation share."""
