"""The frame of every model over a sequence: it knows no operator of a family."""
