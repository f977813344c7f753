"""One module for each table: `jobs(settings)` measures it, `tables(records)` shows the records of the same name."""
