"""What people use today, measured beside ours. `make peers` installs it."""
