"""Models and cameras behind doors that existing clients open; needs the extra `server`."""
