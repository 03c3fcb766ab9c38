"""What the tasks of a hosting platform do: build, create, place, start, publish.

Nothing here knows of upq. Each task is a function of the settings and of its own arguments; called
twice it does no harm. `python -m deploylib TASK name=value...` runs one from a shell.
"""
