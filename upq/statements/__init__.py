"""The store's statements, each built once with SQLAlchemy Core for all three databases.

Those over `rows()` do a whole batch at once. Guards stand in the statement: a row that is not in
the state it should be in is left alone, and the count says so.
"""
