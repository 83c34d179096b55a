"""What was removed, from what? Certificates of removal, and checking them from the checkpoints."""
