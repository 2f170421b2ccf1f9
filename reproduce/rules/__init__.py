"""Rules on the bundled model: hidden facts, indirect cues, unsafe requests."""
