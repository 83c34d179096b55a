"""What is a sink? (ID, neuron) to on or off."""
