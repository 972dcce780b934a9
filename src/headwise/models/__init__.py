"""Models that transformers lacks, and recipes that train small ones on packaged or synthetic data."""
