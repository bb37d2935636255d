"""What embed.py and embed_cluster.py are made of, one job a file.

An image goes through sources, decoding, encoder (with levers) and parts in this order; storage is where files lie, and rounds
says whose turn it is to write."""
