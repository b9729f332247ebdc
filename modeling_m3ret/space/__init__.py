"""The Space: search a gallery with any scan, in a browser. `pages.build` makes it, `app.py` starts it."""
