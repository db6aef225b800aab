"""Rows of tables, names of languages, words of any script, encodings: what every task needs."""

USUAL_COLUMNS = {
    "target_column": "target",
    "group_column": "group",
    "language_column": "language",
    "start": "start",
    "end": "end",
}
"""Names of optional columns where none is chosen, by role."""

MOST_THREADS = 1024
"""More than machines have; far more end the process in libraries."""
WIDEST_BEAM = 100
"""Of what can be waited for."""
