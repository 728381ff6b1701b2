"""Configuration: its values and its files."""
