"""`make gpu`: everything that needs a GPU, as cases in processes of their own, and one table."""
