"""What objectives cost over the registry of a fleet."""
