"""From scans to training samples."""
