"""The report: one set of records, shown in a terminal and as one HTML page."""
