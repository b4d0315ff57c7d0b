"""Token statistics: `formula` is the paper, `operators` the contract, `blocks` the path of long sequences."""
