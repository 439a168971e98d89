"""What is in a network, what it costs, and what TensorBoard shows of it."""
