"""What a person types and is told: commands, options, exit codes. Knows no Ray; the only room that imports click."""
