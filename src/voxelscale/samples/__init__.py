"""Which sample comes when, what it is made of, and how it is augmented."""
