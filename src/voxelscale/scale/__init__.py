"""The scaling study; it only runs trainings and reads their results."""
