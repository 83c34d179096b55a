"""What is in a prepared folder? Looking, checking, and finding the document of a text."""
