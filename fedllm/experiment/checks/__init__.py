"""Every rule that can be decided before a model loads."""
