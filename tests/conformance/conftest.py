"""The stand-ins take the place of transformers' own test files when those are imported; they are not tests of ours."""

collect_ignore = ["stand_ins"]
