"""What never travels with a checkpoint: its code written flat, its card, its checks, and conversion to it."""
