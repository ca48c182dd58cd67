"""What the command runs: plan, parity, residency, speed, prove and doctor, each a function from a problem to a Lane."""
