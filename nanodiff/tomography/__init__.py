"""Volumes of woven composites: their files, their slices, and what can be measured in them."""
