"""The optimal learning rate as a function of the number of training tokens."""
