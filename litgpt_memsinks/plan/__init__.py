"""What will a run take, and will it work? Parameters, memory, time, and what its sinks will do."""
