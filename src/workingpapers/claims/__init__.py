"""The claims of each paper, in the same place as its method."""
