"""Evidence: every form of the model measured against the form that it was made from."""
