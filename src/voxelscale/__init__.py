"""From a folder of CT scans to a model that finds lesions, on one core or on many processes."""

__version__ = "0.2.0"
