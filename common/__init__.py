"""What every command shares: flags, errors, whole files, devices, cached results."""
