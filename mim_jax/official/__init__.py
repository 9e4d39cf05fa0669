"""What is known of the official releases: parameter names both ways, and replays of reference numbers."""
