"""Named tensors: algebra, layout in memory, low-rank and sparse forms, files, and what the wire may do with them."""
