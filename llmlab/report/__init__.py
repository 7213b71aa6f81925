"""HTML pages for people: templates, style sheet and curves as inline SVG; what a page says is up to the callers. Pages
hold no script, load nothing, and escape whatever comes from elsewhere."""
