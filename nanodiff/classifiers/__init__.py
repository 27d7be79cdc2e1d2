"""The small judges that ship: of the drawn worlds and of digits."""
