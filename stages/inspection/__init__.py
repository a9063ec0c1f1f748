"""What any artifact is, as text: its manifest, where it came from, and a readable sample of its files."""
