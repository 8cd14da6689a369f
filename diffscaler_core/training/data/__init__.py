"""What is trained on: pictures found, cut, encoded once, and given out in batches."""
