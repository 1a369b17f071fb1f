"""Choosing among cross-validated configurations, and finding the settings of the chosen one."""
