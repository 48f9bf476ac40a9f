"""Mathematical answers: found in a response, read completely, compared exactly."""
