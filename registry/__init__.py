"""What is known of models and their variants, and what was decided."""
