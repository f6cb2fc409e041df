"""The way of a call: gradients, torch's dispatcher, the choice of a backend, plans."""
