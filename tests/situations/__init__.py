"""What re2fx must survive: one module for each group of rows of the table of situations."""
