"""Networks and losses; this room knows torch and nothing else of the house."""
