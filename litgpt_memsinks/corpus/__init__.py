"""Which files, which format, which documents? Mixtures, readers, and made-up stories for the demo."""
