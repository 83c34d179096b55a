"""Which neurons hold a document in a model without sinks? Post-hoc localisation, and dropping what it finds."""
