"""How does text become a stream? Files to litdata chunks of token, ID, token, ID, ... and tables beside them."""
