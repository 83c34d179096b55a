"""What is gone, and what did it cost? Losses, attacks, intervals, the verdict."""
