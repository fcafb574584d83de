"""Messages between clients, gateways and instances, and the HTTP server that they share."""
