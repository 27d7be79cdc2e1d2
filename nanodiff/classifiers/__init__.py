"""The small classifiers that ship, of the drawn worlds and of digits; the pictures that they must reject."""
