"""What a sparse autoencoder is: architectures, checkpoint formats, bundled dictionaries."""
