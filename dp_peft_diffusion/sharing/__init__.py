"""Files for other people: the shareable folder and its card."""
