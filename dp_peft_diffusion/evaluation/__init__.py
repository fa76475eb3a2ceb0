"""What came out: measurements on generated images."""
