"""Many updates to one, and the conversation that it takes."""
