"""What soups are chosen by and what is reported: metrics by name, floors, how certain a figure is."""
