python := ".venv-test/bin/python"

# list the recipes
default:
    @just --list

# the tests, without slow ones; just test tests/test_cli.py runs one file
test *arguments:
    {{python}} -m pytest {{arguments}}

# style and types
lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m mypy

# build the documentation; every warning is an error
docs:
    {{python}} -m pip install -q -e '.[docs]'
    {{python}} -m mkdocs build --strict

# a benchmark by its name: just bench sentiment --train sst2/train.csv --validation sst2/validation.csv
bench name *arguments:
    {{python}} benchmarks/{{name}}.py {{arguments}}
