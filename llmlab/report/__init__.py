"""HTML pages for people: templates, style sheet and curves as inline SVG; what a page says is up to the callers.
`terminal.py` is the same for terminals. Pages hold no script, load nothing, and escape whatever comes from
elsewhere."""
