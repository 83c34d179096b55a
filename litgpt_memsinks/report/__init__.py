"""The results as a page to look at, pictures and tables. Imports no PyTorch."""
