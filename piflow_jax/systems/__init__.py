"""What can be chosen, as tables: networks, policies, conditions, data sets and judges."""
