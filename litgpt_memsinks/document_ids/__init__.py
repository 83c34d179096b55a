"""Which document is this? Tokens to an int32 ID; which documents are edited copies of each other."""
