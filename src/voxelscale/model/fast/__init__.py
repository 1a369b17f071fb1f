"""The network's arithmetic by ways that are fast on a processor; functions and parameters stay the same."""
