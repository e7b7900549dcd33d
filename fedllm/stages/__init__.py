"""What happens to parameters and updates on their round trip, one idea a file."""
