"""Measuring what a model makes: scores of label maps, distances of features, and the Streets judge."""
