"""What travels between clients, gateways and instances: no sockets, no tensors."""
