"""The tables and views of the database: declared here, changed only by a revision in `migrations/`."""
