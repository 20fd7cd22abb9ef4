"""The page at `/`: plain HTML, CSS and JavaScript, no build step."""
