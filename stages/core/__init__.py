"""What every program shares, with the standard library only: settings, digests, manifests, command line."""
