"""Which of transformers' decoders run: a tiny random model of each type is quantised, loaded and compared.

python -m benchmarks.families [TYPE …] measures (if none is named, those without a row), and writes the table.
"""
