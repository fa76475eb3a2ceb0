"""One run on disk: its two folders, its attempts, what shapes its updates, and the state it resumes from."""
