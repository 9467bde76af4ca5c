"""One run of an experiment: what it is made of, what is checked before it, and how it runs."""
