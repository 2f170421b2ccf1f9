"""Studies on the bundled model: what published methods do when the server's own edits carry them out."""
