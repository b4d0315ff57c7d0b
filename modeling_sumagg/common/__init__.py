"""What every part may use, and what uses no other: checks of inputs, positions, versions of transformers, whole files."""
