"""Limits per tenant: requests per minute and hour, burst, and concurrent requests."""
