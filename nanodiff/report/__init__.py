"""The report's figures and questions. A guest: nothing of the library imports it."""
