"""The versioned configuration: durable, and pushed to everybody who obeys it."""
