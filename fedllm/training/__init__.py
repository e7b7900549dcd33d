"""What clients do with their data."""
