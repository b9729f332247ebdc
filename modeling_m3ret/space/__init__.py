"""A web page to search a gallery with any scan. `pages.build` builds it and `app.py` serves it."""
