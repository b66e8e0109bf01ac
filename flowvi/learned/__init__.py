"""What is learned while SVI runs: adaptive flows, and the cost models of control variates."""
