"""On a GPU: equality first, then times, then a step's launches beside their prediction. `make bench-gpu`.

    python -m benchmarks.gpu [--quick] [--precision fp16 tf32 fp32 bf16] [--out FILE.json] [--markdown FILE.md]

What is wrong gets no time, and the exit code is 1 then. Parts, peers and fits: benchmarks/gpu_parts.py; the tables:
benchmarks/gpu_tables.py.
"""
