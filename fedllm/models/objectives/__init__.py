"""What a client trains for: records to examples with labels."""
