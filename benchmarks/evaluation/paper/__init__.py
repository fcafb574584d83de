"""The paper's evaluation on this machine, and simulated on its own hardware."""
