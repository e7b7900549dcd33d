"""The experiment: its record, its file, the catalog of names, methods, schedules and checks."""
