"""Do the paper's theorems hold? Linear toy models against the printed bounds."""
