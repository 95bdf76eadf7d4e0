"""Plain single-process code written from the paper, to test the package against."""
