"""Drop-ins for other packages: each is applied by one call, says what it replaced, and can be undone."""
