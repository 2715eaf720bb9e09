"""What a run will take of machines that are not here: `python -m jaxpref.plan`."""
