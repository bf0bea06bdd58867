"""Does choosing by heads work? What was run to find out, and the page that says what came of it."""
