"""The REST face of Backstop: submit a job, poll its result. Everything it knows comes from the worker's ledger."""
