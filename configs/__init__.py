"""The run schema and complete runs, one YAML each."""
