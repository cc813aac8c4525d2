"""Look at it: pictures and HTML reports."""
