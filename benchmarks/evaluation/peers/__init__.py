"""What people use today, measured beside ours. `make peers-install` installs it."""
