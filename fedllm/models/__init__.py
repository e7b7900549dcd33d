"""What is trained: base models, adapters, scopes, objectives, data and templates."""
