"""Models as files: saved, loaded, or converted without ever being in memory."""
