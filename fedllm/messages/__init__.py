"""What crosses between server and client, and nothing else: as objects and as bytes."""
