"""The networks, one file each; their shared parts are in blocks.py."""
