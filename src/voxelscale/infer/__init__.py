"""A network on one scan, window by window."""
