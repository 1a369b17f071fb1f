"""What a data set holds: its layout, its cases and their names, and how they are read."""
