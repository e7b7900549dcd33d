"""Many updates to one, and the calls that this takes."""
