"""What never travels with a checkpoint: remote code, cards, checks, conversion, saved states."""
