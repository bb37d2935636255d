"""What embed.py is made of, one job a file: an image goes through sources, decoding, encoder and parts in this order."""
