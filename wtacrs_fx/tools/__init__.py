"""A workbench over the rest: demo, predictions, measurements, pictures."""
