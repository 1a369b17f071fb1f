"""The scaling study; it only calls training and looks at what came of it."""
