"""Gets from a name to weights on a device, each file checked before it is believed. Knows no clip."""
