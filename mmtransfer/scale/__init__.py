"""Past one machine: archives and corpora in bulk, here or on Ray, and journals of many sites."""
