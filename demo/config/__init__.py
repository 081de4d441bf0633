"""What the commands can be told: keys, types and ranges, and the one line for a mistake."""
