"""What a training costs and yields at other numbers of workers."""
