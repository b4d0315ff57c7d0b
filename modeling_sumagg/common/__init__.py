"""What models of several families share, decoders or not: checks of inputs, positions, decays."""
