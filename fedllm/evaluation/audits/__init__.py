"""What a run leaks, by attacks on it: functions of a model, its parameters and records."""
