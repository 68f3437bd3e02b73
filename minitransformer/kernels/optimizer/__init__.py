"""Parameter updates over one flat buffer."""
