"""The command line: verbs, and what they show while they run."""
