"""A batch in simulated time: the run's own rules, on a cluster that exists in numbers alone."""
