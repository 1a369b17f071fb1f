"""The local page in which a reader sees what was found, judges it and corrects it."""
