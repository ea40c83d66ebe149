"""What a GPU is asked in its first fifteen minutes, by one command: `bash benchmarks/first_light/run.sh`."""
