"""What is left without some documents? Removing their sinks from a model that goes on being used with the rest."""
